"""What is measured: one model at one size on one device, the same for every contender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.specs import PUBLISHED, Geometry, ModelSpec, TextSpec, VAESpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GUIDANCE = 6.0
TIMESTEP = 500.0
OFS = 2.0  # of 1.5 image to video


class NotMeasured(Exception):
    """A contender that has no such thing to measure; the message says why."""


@dataclass(frozen=True)
class Setting:
    """A variant at its native size, or the tiny model of its kind. ``device``: cuda, cpu or meta."""

    variant: str
    spec: ModelSpec
    vae: VAESpec
    text: TextSpec
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """[1, C, T, H, W] as the network sees it: with the padding frames of 1.5."""
        b, c, t, h, w = self.geometry.latent_shape()
        return b, c, t + self.spec.padding_frames(t), h, w

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def latent(self, batch: int = 1) -> Tensor:
        """Input of the network: [B, in_channels, T, H, W]."""
        _, _, t, h, w = self.latent_shape
        return self.randn(batch, self.spec.transformer.in_channels, t, h, w)

    def context(self, batch: int = 1) -> Tensor:
        return self.randn(batch, self.spec.text_tokens, self.spec.transformer.text_embed_dim)

    def timestep(self, batch: int = 1) -> Tensor:
        return torch.full((batch,), TIMESTEP, device=self.device)

    def ofs(self, batch: int = 1) -> Tensor:
        return torch.full((batch,), OFS, device=self.device)

    def vae_latent(self) -> Tensor:
        """[1, C, T, H, W] of the native clip, unscaled, without padding frames."""
        return self.randn(*self.geometry.latent_shape())

    def pixels(self) -> Tensor:
        """A clip as ComfyUI's IMAGE, on the CPU unless this is the meta device: [T, H, W, 3] in 0..1, fp32."""
        place = "meta" if self.device.type == "meta" else "cpu"
        return torch.rand(self.geometry.frames, self.geometry.height, self.geometry.width, 3, device=place)


def make_setting(variant: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> Setting:
    if not tiny:
        spec = PUBLISHED[variant]
        geometry = Geometry(spec, spec.native_width, spec.native_height, spec.transformer.sample_frames)
        return Setting(variant, spec, VAESpec(), TextSpec(), geometry, device, dtype)
    from ..model_loaders.detect import TRANSFORMER_CLASS, VAE_CLASS, model_from_configs, vae_from_config
    from ..scripts import tiny_pipeline

    vae = {"_class_name": VAE_CLASS, **tiny_pipeline.vae_config(variant)}
    spec = model_from_configs({"_class_name": TRANSFORMER_CLASS, **tiny_pipeline.transformer_config(variant)}, vae,
                              tiny_pipeline.scheduler_config(variant))
    geometry = Geometry(spec, 8 * tiny_pipeline.LATENT_WIDTH, 8 * tiny_pipeline.LATENT_HEIGHT, tiny_pipeline.FRAMES)
    text = TextSpec(d_model=tiny_pipeline.TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return Setting(variant, spec, vae_from_config(vae), text, geometry, device, dtype)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights in place, for timing: matrices N(0, 0.02), scales 1, shifts 0. Zeros would run faster."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.device.type == "meta" or not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                tensor.normal_(std=0.02)
            else:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    return module.eval().requires_grad_(False)


def materialise(make: Callable[[], torch.nn.Module], setting: Setting) -> Any:
    """A module of torch layers, made on the meta device and then directly in its dtype on its device, random."""
    with torch.device("meta"):
        module = make().to(setting.dtype)
    return randomise(module if setting.device.type == "meta" else module.to_empty(device=setting.device))


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
