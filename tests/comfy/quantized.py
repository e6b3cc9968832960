"""What the tests of quantization share: the demo transformer, a forward of it, and what is quantized in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from cogx.model_loaders.quantization import QUANTIZED_LAYERS
from cogx.scripts import demo_pipeline
from safetensors.torch import load_file

DEMO = demo_pipeline.DEMO / demo_pipeline.MAIN
TRANSFORMER = DEMO / "transformer"


def demo_tensors() -> dict[str, torch.Tensor]:
    return load_file(TRANSFORMER / "diffusion_pytorch_model.safetensors")


def chosen(key: str) -> bool:
    """Whether the pack quantizes this weight of a transformer."""
    return key.endswith(".weight") and bool(QUANTIZED_LAYERS["transformer"].fullmatch(key.removesuffix(".weight")))


def forward(patcher: Any, load: bool = True) -> torch.Tensor:
    """The network once, on a seeded latent, at two timesteps: [2, 16, 5, 8, 12]."""
    if load:
        comfy.model_management.load_models_gpu([patcher])
    spec = patcher.model.spec.transformer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, spec.in_channels, 5, 8, 12, generator=generator)
    context = torch.randn(2, spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
    ofs = torch.full((2,), 2.0) if spec.ofs_embed_dim else None
    return patcher.model.diffusion_model(x, torch.tensor([999.0, 300.0]), context, ofs=ofs)


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path
