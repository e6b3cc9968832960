"""A MODEL to one safetensors file, weight by weight: what is loaded, quantized or with its LoRAs merged if asked.

The file appears under its name when it is whole: it is written beside it, and renamed. Weights are written as they are
made, so that a quantized or merged copy of the model is never in memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import comfy.lora
import comfy.model_management
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor

from ..models.cogvideox.transformer import with_published_keys
from ..models.specs import ModelSpec, SpecError
from .quantization import FORMATS, as_bytes, check_quantization, quantized, smoothed, wants
from .quantized_files import Layers
from .saved_spec import spec_metadata

log = logging.getLogger("cogx")

AS_LOADED = "as_loaded"
_NETWORK = "diffusion_model."
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
           torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8"}
_SCALES = ("input_scale", "pre_quant_scale")  # parameters too, but written with their weight
_ENTRIES = 6  # tensors that a quantized weight can become
_ENTRY_SIZE = 200  # bytes that one takes in the header, its name apart


def save_model(patcher: Any, path: Path, quantization: str = AS_LOADED, merge_loras: bool = False) -> str:
    """Write the transformer of ``patcher`` to ``path``; returns what was written, in words.

    Raises:
        SpecError: not a CogVideoX model; a format that cannot be; no space; the folder cannot be written to.
    """
    spec = getattr(patcher.model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise SpecError("Expected a CogVideoX model from this pack's loaders, got "
                        f"{type(patcher.model).__name__}. Save it with ComfyUI's own Save Model (ModelSave).")
    if quantization in FORMATS:
        check_quantization(quantization, _layers_of(patcher))
    _check_space(path, _estimate(patcher, quantization))
    # What is loaded has its LoRAs merged in place; unloading brings back the weights as they were.
    comfy.model_management.unload_model_and_clones(patcher)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            count = _write(file, patcher, spec, quantization, merge_loras)
        os.replace(temporary, path)
    except OSError as error:
        raise SpecError(f"{path} could not be written: {error.strerror or error}. Free some space, or choose a folder "
                        "that ComfyUI may write to.") from error
    finally:
        temporary.unlink(missing_ok=True)
    words = f"{path.name}: CogVideoX {spec.name}, {path.stat().st_size / 1e9:.2f} GB, {count} tensors"
    left_out = 0 if merge_loras else sum(key.startswith(_NETWORK) for key in patcher.patches)
    if left_out:
        words += f". {left_out} weights have LoRAs or merges that are not in the file: set merge_loras to write them"
    log.info("Saved %s", words)
    return words


def _layers_of(patcher: Any) -> Layers:
    return {name: {"format": module.quant_format} for name, module in patcher.model.diffusion_model.named_modules()
            if getattr(module, "quant_format", None)}


def _estimate(patcher: Any, quantization: str) -> int:
    """Bytes of the file, from above."""
    total = 2**20
    for key, value in patcher.model.diffusion_model.named_parameters():
        unpacked = value.numel() * _dtype_of(patcher, key, value).itemsize
        held = value.nbytes if _is_quantized(value) and quantization != "none" else unpacked
        if quantization in FORMATS and wants("transformer", key, value.shape, FORMATS[quantization]):
            held = value.numel()
        total += held + held // 20
    return total


def _dtype_of(patcher: Any, name: str, value: Any) -> torch.dtype:
    """What the loader chose for the parameter ``name``: under dynamic VRAM it stays as in the file until it is used."""
    module, leaf = comfy.utils.resolve_attr(patcher.model.diffusion_model, name)
    return getattr(module, f"{leaf}_comfy_model_dtype", None) or value.dtype


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SpecError(f"{path.parent}: expected {needed / 1e9:.1f} GB of free disk for the file, got "
                        f"{free / 1e9:.1f} GB. Free some space, or quantize the file.")


def _is_quantized(value: Any) -> bool:
    return isinstance(value, comfy.quant_ops.QuantizedTensor)


def _write(file: BinaryIO, patcher: Any, spec: ModelSpec, quantization: str, merge_loras: bool) -> int:
    """The whole file. The header comes first and is known last: its place is kept, and filled up with blanks."""
    network = patcher.model.diffusion_model
    metadata = {"format": "pt", **spec_metadata(spec), "cogx.quantization": quantization}
    names = [name for name, _ in network.named_parameters() if name.rpartition(".")[2] not in _SCALES]
    reserved = sum(len(name) + _ENTRY_SIZE for name in names) * _ENTRIES + 2 * len(json.dumps(metadata)) + _ENTRY_SIZE
    reserved += -reserved % 8
    base = 8 + reserved
    file.seek(base)
    header: dict[str, Any] = {"__metadata__": metadata}
    progress = comfy.utils.ProgressBar(len(names))
    notes: dict[str, Tensor] = {}
    for name in names:
        for key, tensor in _entries(patcher, name, quantization, merge_loras):
            if key == name:
                header[key] = _append(file, base, tensor)
            else:
                notes[key] = tensor
        progress.update(1)
    # Scales before notes, whose odd lengths would leave what follows misaligned.
    for key in sorted(notes, key=lambda key: -notes[key].element_size()):
        header[key] = _append(file, base, notes[key])
    file.seek(0)
    file.write(struct.pack("<Q", reserved) + json.dumps(with_published_keys(header)).encode().ljust(reserved))
    file.flush()
    os.fsync(file.fileno())
    return len(header) - 1


def _append(file: BinaryIO, base: int, tensor: Tensor) -> dict[str, Any]:
    """Write a tensor; returns its entry in the header."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    start = file.tell() - base
    file.write(data.numpy())
    return {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + data.numel()]}


def _entries(patcher: Any, name: str, quantization: str, merge_loras: bool) -> Iterator[tuple[str, Tensor]]:
    """What the parameter ``name`` becomes in the file, by key."""
    key, layer = _NETWORK + name, name.removesuffix(".weight")
    value = comfy.utils.get_attr(patcher.model, key)
    merge = merge_loras and key in patcher.patches
    form = FORMATS.get(quantization)
    if form and not _is_quantized(value) and wants("transformer", name, value.shape, form):
        value = quantized(_finite(name, _merged(patcher, key, value)) if merge else value.detach(), form)
        yield from value.entries(layer).items()
    elif _is_quantized(value) and quantization == "none":
        weight = _finite(name, _merged(patcher, key, value).to(value.dtype)) if merge else value.dequantize()
        module = comfy.utils.get_attr(patcher.model.diffusion_model, layer)
        yield name, smoothed(weight, getattr(module, "pre_quant_scale", None))
    elif merge:
        # ComfyUI's own merge: a quantized weight comes back quantized as it was, rounded as in a run.
        merged = patcher.patch_weight_to_device(key, device_to=patcher.load_device, return_weight=True)
        _finite(name, merged.dequantize() if _is_quantized(merged) else merged)
        yield from _as_stored(patcher, name, merged)
    else:
        yield from _as_stored(patcher, name, value)


def _finite(name: str, merged: Tensor) -> Tensor:
    if not merged.isfinite().all():
        raise SpecError(f"{name}: expected finite values, got NaN or infinity from its LoRAs or merges. Lower their "
                        "strength, or save without merge_loras. Nothing was written.")
    return merged


def _as_stored(patcher: Any, name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if not _is_quantized(value):
        yield name, value.to(_dtype_of(patcher, name, value))
        return
    layer = name.removesuffix(".weight")
    module = comfy.utils.get_attr(patcher.model.diffusion_model, layer)
    entries = {**module.state_dict(prefix=f"{layer}."), **value.state_dict(name)}
    entries.pop(f"{layer}.bias", None)  # a parameter of its own
    for key, tensor in entries.items():
        yield key, as_bytes(tensor)


def _merged(patcher: Any, key: str, value: Any) -> Tensor:
    """The weight with its patches, in full precision."""
    weight = value.dequantize() if _is_quantized(value) else value
    weight = weight.to(device=patcher.load_device, dtype=torch.float32, copy=True)
    return comfy.lora.calculate_weight(patcher.patches[key], weight, key)
