"""The weights of a component, whatever the files and the layout, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import comfy.utils
import torch

from .files import SAFETENSORS, readable_kind
from .gguf_files import read_gguf_header, read_gguf_tensors
from .keys import Part
from .quantization import dequantized
from .quantized_files import Described, StoredWeight, gather
from .torch_files import read_torch

Weight = torch.Tensor | StoredWeight


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by its own keys, memory mapped; what is packed in a GGUF file as its bytes.

    Raises:
        SpecError: as ``quantized_files.describe``.
    """
    kind = readable_kind(file)
    if kind == "torch":
        return read_torch(file)
    if kind == "gguf":
        return read_gguf_tensors(file, read_gguf_header(file))
    if file.suffix.lower() in SAFETENSORS:
        return comfy.utils.load_torch_file(str(file))  # the host's way, so that it can stream the weights
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict


def pieces(source: Described, parts: dict[str, Part], dtype: torch.dtype) -> Iterator[tuple[str, Weight]]:
    """The weights, one at a time and layer by layer, by the keys of ``parts``. Views of the mapped files, but for the
    few that are put together from several places, or with a LoRA; for these, ``dtype`` is what is unpacked to."""
    stored: dict[str, torch.Tensor] = {}
    for file in source.files:
        stored.update(read_tensors(file))
    weights = gather(stored, source.layers, source.tensors)
    for key in sorted(parts, key=_layer_of):
        yield key, _take(parts[key], weights, dtype)


def batches(source: Described, parts: dict[str, Part], dtype: torch.dtype) -> Iterator[dict[str, Weight]]:
    """The same, a layer at a time."""
    for _, group in groupby(pieces(source, parts, dtype), key=lambda piece: _layer_of(piece[0])):
        yield dict(group)


def _layer_of(key: str) -> str:
    return ".".join(key.split(".")[:2])


def _take(part: Part, weights: Mapping[str, Weight], dtype: torch.dtype) -> Weight:
    weight = weights[part.key]
    if isinstance(weight, StoredWeight):
        if not part.blocks and not part.factors:
            return replace(weight, shape=part.shape)
        weight = dequantized(weight, dtype)
    if part.blocks:
        rows = weight.shape[0] // part.of
        first, last = part.blocks[0], part.blocks[-1]
        if part.blocks == tuple(range(first, last + 1)):
            weight = weight[first * rows:(last + 1) * rows]
        else:
            weight = torch.cat([weight[block * rows:(block + 1) * rows] for block in part.blocks])
    if part.factors:
        up, down = (_plain(weights[key]) for key in part.factors)
        weight = (weight.float() + up @ down / down.shape[0]).to(dtype)  # SAT's lora_alpha is 1
    return weight.reshape(part.shape).contiguous()


def _plain(weight: Weight) -> torch.Tensor:
    return (dequantized(weight, torch.float32) if isinstance(weight, StoredWeight) else weight).float()
