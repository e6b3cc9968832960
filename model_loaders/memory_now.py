"""The memory plan of a run on this machine now: asks ComfyUI, loads, moves and frees nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..models.cogvideox.base_model import CogVideoXConfig, forward_memory
from ..models.cogvideox.transformer import CogVideoXTransformer
from ..models.cogvideox.vae import CogVideoXVAENetwork
from ..models.cogvideox.vae_plan import (
    LATENT_CHUNK,
    PIXEL_CHUNK,
    Plan,
    choose,
    chunk_bounds,
    cpu_plan,
    decode_memory,
    decoded_frames,
    encode_memory,
)
from ..models.smaller import nearest_fitting
from ..models.specs import Geometry, ModelSpec, TextSpec, VAESpec
from .find import expected_shapes, expected_text_shapes
from .load import DTYPES, model_dtypes, text_dtype
from .memory_plan import Coding, MemoryPlan, Place, Sampling, Stage, plan_coding, plan_sampling, plan_text, text_memory
from .text_encoder import tokenizer_of
from .vae import SMALLEST, require_cogvideox
from .vae_ladder import budget_of


@dataclass(frozen=True)
class Network:
    """A network, loaded or not. loaded: bytes of its weights on its device. on_disk: bytes still to be read."""

    device: torch.device
    weight_dtype: torch.dtype
    value: int  # bytes of a value that it computes with
    weights: float
    loaded: float
    on_disk: float
    dynamic: bool = False  # ComfyUI's dynamic VRAM holds them
    module: Any = None

    @property
    def dtype(self) -> str:
        """Of its weights; the formats of those that are quantized, and what the others are in."""
        layers = [] if self.module is None else self.module.modules()
        formats = sorted({layer.quant_format for layer in layers if getattr(layer, "quant_format", None)})
        return " and ".join([*formats, str(self.weight_dtype).removeprefix("torch.")])

    def place(self) -> Place:
        """Its device, for it alone."""
        budget = budget_of(self.device)
        if budget.unified:  # a CPU, where weights that are read already are in the RAM that is taken
            return Place("cpu", budget.free + self.weights - self.on_disk, 0, streams=False)
        return Place(str(self.device), budget.free + budget.others, comfy.model_management.minimum_inference_memory(),
                     streams=True, yields=self.dynamic)


def _loaded(patcher: Any, dtype: torch.dtype, value: int) -> Network:
    return Network(patcher.load_device, dtype, value, patcher.model_size(), patcher.loaded_size(), 0,
                   patcher.is_dynamic(), patcher.model)


def _published(device: torch.device, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]],
               value: int | None = None) -> Network:
    weights = parameters_of(shapes.values()) * dtype.itemsize
    dynamic = comfy.model_patcher.CoreModelPatcher is not comfy.model_patcher.ModelPatcher  # main.py rebinds it
    return Network(device, dtype, value or dtype.itemsize, weights, 0, weights, dynamic)


def parameters_of(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


class Run:
    """What is asked: networks that are connected, or those of a published model.

    Args:
        spec: of the model. model, clip, vae: loaded ones, or None.
        weight_dtype: as in the loaders, for those that are not.

    Raises:
        SpecError: a CLIP or a VAE of another model family.
    """

    def __init__(self, spec: ModelSpec, weight_dtype: str, model: Any = None, clip: Any = None,
                 vae: Any = None) -> None:
        self.spec = spec
        self.text_spec, self.tokens = TextSpec(), spec.text_tokens
        self.vae_spec = VAESpec()
        self.model = self._model(weight_dtype, model)
        self.text = self._text(weight_dtype, clip)
        self.vae = self._vae(weight_dtype, vae)

    def _model(self, weight_dtype: str, patcher: Any) -> Network:
        if patcher is not None:
            inner = patcher.model
            value = comfy.model_management.dtype_size(inner.get_dtype_inference())
            return _loaded(patcher, inner.get_dtype(), value)
        shapes = expected_shapes(CogVideoXTransformer, self.spec.transformer)
        stored = torch.float16 if self.spec.fp16_safe else torch.bfloat16
        dtype, cast = model_dtypes(CogVideoXConfig(self.spec), weight_dtype, parameters_of(shapes.values()), stored)
        return _published(comfy.model_management.get_torch_device(), dtype, shapes, (cast or dtype).itemsize)

    def _text(self, weight_dtype: str, clip: Any) -> Network:
        if clip is not None:
            self.tokens = tokenizer_of(clip).max_tokens
            self.text_spec = getattr(clip.cond_stage_model, "text_spec", TextSpec())  # one of core's is T5-XXL
            dtype = next(clip.cond_stage_model.parameters()).dtype
            return _loaded(clip.patcher, dtype, dtype.itemsize)
        stored = torch.float32 if self.spec.is_v1_5 else torch.bfloat16
        dtype = DTYPES.get(weight_dtype) or text_dtype(stored)
        shapes = expected_text_shapes(TextSpec(), {"shared.weight": ()})
        return _published(comfy.model_management.text_encoder_device(), dtype, shapes)

    def _vae(self, weight_dtype: str, vae: Any) -> Network:
        if vae is not None:
            self.vae_spec = require_cogvideox(vae).spec
            return replace(_loaded(vae.patcher, vae.vae_dtype, vae.vae_dtype.itemsize), device=vae.device)
        device = comfy.model_management.vae_device()
        dtype = DTYPES.get(weight_dtype) or comfy.model_management.vae_dtype(device, [torch.bfloat16, torch.float32])
        return _published(device, dtype, expected_shapes(CogVideoXVAENetwork, VAESpec()))

    def text_stage(self) -> Stage:
        place = self.text.place()
        peak = text_memory(self.text_spec, self.tokens, self.text.value, fused=place.streams)
        return plan_text(self.text.weights, peak, self.text.dtype, place)

    def sampling(self, geometry: Geometry, batch: int) -> Sampling:
        _, channels, frames, *size = geometry.latent_shape()
        frames += self.spec.padding_frames(frames)

        def forward(videos: int) -> float:
            return forward_memory(self.spec, (videos, channels, frames, *size), self.model.value)

        return plan_sampling(self.model.weights, forward, batch, self.model.dtype, self.model.place())

    def decode(self, geometry: Geometry) -> Coding:
        shape = geometry.latent_shape()[2:]
        first = decoded_frames(chunk_bounds(shape[0], LATENT_CHUNK)[0][1])
        return self._coding(partial(decode_memory, self.vae_spec, shape, self.vae.value), first)

    def encode(self, geometry: Geometry, kind: str) -> Coding | None:
        """kind: one of memory_plan.ENCODES."""
        if kind == "auto":
            kind = "image" if self.spec.takes_image else "none"
        if kind == "none":
            return None
        frames = 1 if kind == "image" else geometry.frames
        memory = partial(encode_memory, self.vae_spec, (frames, geometry.height, geometry.width), self.vae.value)
        return self._coding(memory, chunk_bounds(frames, PIXEL_CHUNK)[0][1])

    def _coding(self, memory: Callable[[Plan], Any], frames: int) -> Coding:
        missing = self.vae.weights - self.vae.loaded
        budget = budget_of(self.vae.device, self.vae.module, missing)
        if budget.unified:
            budget = replace(budget, free=budget.free - self.vae.on_disk)
        plan = choose(memory, budget, cpu_plan(self.vae_spec, frames))
        return plan_coding(self.vae.weights, memory, plan, SMALLEST, self.vae.dtype, str(self.vae.device))

    def plan(self, geometry: Geometry, batch: int, encode: str) -> MemoryPlan:
        """The whole run. encode: one of memory_plan.ENCODES."""
        networks = (self.text, self.model, self.vae)
        found = MemoryPlan(geometry, batch, self.text_stage(), self.sampling(geometry, batch),
                           self.encode(geometry, encode), self.decode(geometry), _free({n.device for n in networks}),
                           comfy.model_management.get_free_memory(torch.device("cpu")),
                           sum(network.on_disk for network in networks))
        if found.fits or not found.text.fits:
            return found

        def fits(smaller: Geometry) -> bool:
            stages = (self.sampling(smaller, batch), self.encode(smaller, encode), self.decode(smaller))
            return all(stage is None or stage.fits for stage in stages)

        return replace(found, instead=tuple(nearest_fitting(geometry, fits)))


def _free(devices: set[torch.device]) -> dict[str, dict[str, int]]:
    budgets = {str(device): budget_of(device) for device in sorted(devices, key=str)}
    return {name: {"free": round(budget.free), "obtainable": round(budget.free + budget.others)}
            for name, budget in budgets.items()}
