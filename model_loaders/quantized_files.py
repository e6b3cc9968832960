"""What is quantized in a file: from its header to plain names and shapes, and from its tensors to ``StoredWeight``.

A quantized weight is several tensors on disk (values, scales, a note of the format). Above this module it is one entry
under its plain name, ``X.weight``, so that what a file holds is read from names and shapes as if nothing were
quantized, and keys can be renamed without knowing of it. Pure: no ComfyUI.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.specs import SpecError
from .files import TensorInfo, read_header, readable_kind
from .gguf_blocks import FORMATS as GGUF_TYPES
from .gguf_files import read_gguf_header
from .torch_files import infos, read_torch

Layers = dict[str, dict[str, Any]]  # by the name of the layer: ComfyUI's comfy_quant, {"format": ...}

GGUF = "gguf_"  # begins the format of a weight that is held as GGUF blocks
FULL_PRECISION = "full_precision_matrix_mult"
_BY_DTYPE = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8_tensorwise"}
# Values that one stored element of a row holds.
_PACKED = {"float8_e4m3fn": 1, "float8_e5m2": 1, "int8_tensorwise": 1, "mxfp8": 1, "nvfp4": 2}
_BLOCK = {"mxfp8": 32, "nvfp4": 16}  # values that share a scale, where there is one for each block
_METADATA_KEY = "_quantization_metadata"
_SCALED_FP8 = "scaled_fp8"
_NOTE = ".comfy_quant"
_MAX_NOTE = 4096  # bytes; they are a few dozen
# Names of what belongs to a weight, and the name that ComfyUI now has for each.
_COMPANIONS = {"weight_scale": "weight_scale", "weight_scale_2": "weight_scale_2", "input_scale": "input_scale",
               "pre_quant_scale": "pre_quant_scale", "scale_weight": "weight_scale", "scale_input": "input_scale"}
_BLOCKS = "_qweight"  # X.Q4_0_qweight: GGUF blocks in a safetensors file, as Kijai publishes them
_FOREIGN = {"quant_map": "bitsandbytes", "SCB": "bitsandbytes", "absmax": "bitsandbytes", "qzeros": "GPTQ or AWQ",
            "g_idx": "GPTQ", "_data": "optimum-quanto", "weight_scale_inv": "block-wise scaling",
            "weight_zero_point": "a method with zero points", "weight_g_idx": "a method with groups"}


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight of a linear layer.

    ``shape`` is [out, in] of the weight it stands for; ``data`` are the stored values (uint8 [out, bytes] for GGUF);
    ``companions`` are the scales, by ComfyUI's names for them.
    """

    conf: dict[str, Any]
    data: Tensor
    companions: dict[str, Tensor]
    shape: tuple[int, ...]

    def entries(self, layer: str) -> dict[str, Tensor]:
        """As ComfyUI's mixed precision layers load it and as it is saved."""
        note = torch.tensor(list(json.dumps(self.conf).encode()), dtype=torch.uint8)
        named = {f"{layer}.{name}": value for name, value in self.companions.items()}
        return {f"{layer}.weight": self.data, **named, f"{layer}{_NOTE}": note}


class Described(NamedTuple):
    """What is in some files, by their own keys: plain names and shapes, what is quantized, their metadata, and what
    stands beside each quantized weight, by ComfyUI's names."""

    files: list[Path]
    tensors: dict[str, TensorInfo]
    layers: Layers
    metadata: dict[str, Any]
    companions: dict[str, set[str]]


def describe(files: list[Path]) -> Described:
    """Looks at safetensors, torch and GGUF files that belong together. Reads headers only.

    Raises:
        SpecError: a file is missing, damaged or of no kind that is read; a format is not known; a scale is missing.
    """
    tensors: dict[str, TensorInfo] = {}
    packed: dict[str, TensorInfo] = {}
    metadata: dict[str, Any] = {}
    notes: dict[str, bytes] = {}
    for file in files:
        kind = readable_kind(file)
        if kind == "gguf":
            header = read_gguf_header(file)
            packed.update(header.info())
            metadata.update(header.metadata)
        elif kind == "torch":
            values = read_torch(file)
            tensors.update(infos(values))
            notes.update({key: values[key].contiguous().view(torch.uint8).numpy().tobytes()
                          for key in _notes_in(infos(values))})
        else:
            found, noted = read_header(file)
            tensors.update(found)
            metadata.update(noted)
            notes.update(_small_tensors(file, _notes_in(found)))
    plain, layers = _plain(tensors, metadata, notes, str(files[0] if len(files) == 1 else files[0].parent))
    beside = {layer: {new for old, new in _COMPANIONS.items() if f"{layer}.{old}" in tensors} for layer in layers}
    return Described(files, {**plain, **packed}, {**layers, **_gguf_layers(packed)}, metadata, beside)


def gather(stored: dict[str, Tensor], layers: Layers, shapes: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What was read from the files, with each quantized weight and all that belongs to it as one ``StoredWeight``."""
    values: dict[str, Any] = dict(stored)
    for layer, conf in layers.items():
        name = conf["format"].removeprefix(GGUF)
        data = values.pop(f"{layer}.{name}{_BLOCKS}", None)
        if data is None:
            data = values.pop(f"{layer}.weight")
        companions = {new: values.pop(f"{layer}.{old}") for old, new in _COMPANIONS.items()
                      if f"{layer}.{old}" in values}
        if conf["format"] in _BY_DTYPE.values():  # fp8 without a scale is fp8 with the scale 1
            scale = companions.get("weight_scale", torch.ones((), dtype=torch.float32))
            companions["weight_scale"] = scale[:, None] if scale.dim() == 1 and len(scale) > 1 else scale  # of each row
        # A calibrated scale of exactly 1 is a placeholder that older tools write (so says ComfyUI's own reader).
        if "input_scale" in companions and float(companions["input_scale"].float().max()) == 1.0:
            del companions["input_scale"]
        values.pop(layer + _NOTE, None)
        values[f"{layer}.weight"] = StoredWeight(conf, data, companions, shapes[f"{layer}.weight"].shape)
    values.pop(_SCALED_FP8, None)
    return values


def _gguf_layers(tensors: Mapping[str, TensorInfo]) -> Layers:
    return {key.removesuffix(".weight"): {"format": GGUF + info.dtype} for key, info in tensors.items()
            if info.dtype in GGUF_TYPES and key.endswith(".weight")}


def _plain(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any], notes: Mapping[str, bytes],
           where: str) -> tuple[dict[str, TensorInfo], Layers]:
    _refuse_foreign(tensors, where)
    layers = _noted_layers(metadata, notes, where)
    _add_unnoted(tensors, layers)
    plain = {key: info for key, info in tensors.items() if not _is_companion(key)}
    for layer, conf in layers.items():
        plain.update(_plain_weight(layer, conf, tensors, where))
        plain.pop(f"{layer}.{conf['format'].removeprefix(GGUF)}{_BLOCKS}", None)
    return plain, layers


def _is_companion(key: str) -> bool:
    return key == _SCALED_FP8 or key.endswith("." + _SCALED_FP8) or key.endswith(_NOTE) or (
        key.rpartition(".")[2] in _COMPANIONS)


def _refuse_foreign(tensors: Iterable[str], where: str) -> None:
    for key in tensors:
        tool = _FOREIGN.get(key.rpartition(".")[2])
        if tool:
            raise SpecError(f"{where} is quantized by {tool} ({key}), which ComfyUI cannot read. Expected bf16, fp16, "
                            "fp32, fp8, int8 as ComfyUI has it, or GGUF; download one of these.")


def _notes_in(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [key for key, info in tensors.items()
            if key.endswith(_NOTE) and len(info.shape) == 1 and info.shape[0] <= _MAX_NOTE]


def _noted_layers(metadata: Mapping[str, Any], notes: Mapping[str, bytes], where: str) -> Layers:
    """The layers whose format the file itself notes, in its metadata or beside each weight."""
    try:
        noted = json.loads(metadata[_METADATA_KEY])["layers"] if _METADATA_KEY in metadata else {}
        noted = {**noted, **{key.removesuffix(_NOTE): json.loads(value) for key, value in notes.items()}}
        layers = {str(layer): dict(conf) for layer, conf in noted.items()}
        if not all(isinstance(conf.get("format"), str) for conf in layers.values()):
            raise ValueError("a layer has no format")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpecError(f"{where}: its notes on quantization are damaged ({error}). Download it again.") from None
    return layers


def _add_unnoted(tensors: Mapping[str, TensorInfo], layers: Layers) -> None:
    """The layers whose format is seen from their dtype: scaled fp8 as it was before the notes, plain fp8, int8."""
    marks = [key for key in tensors if key == _SCALED_FP8 or key.endswith("." + _SCALED_FP8)]
    # Two elements mean: multiply in full precision (ComfyUI's convert_old_quants).
    full = any(tensors[mark].shape == (2,) for mark in marks)
    for key, info in tensors.items():
        layer, _, name = key.rpartition(".")
        if name.endswith(_BLOCKS):
            layers[layer] = {"format": GGUF + name.removesuffix(_BLOCKS)}
        if name != "weight" or layer in layers or info.dtype not in _BY_DTYPE:
            continue
        scaled = any(f"{layer}.{scale}" in tensors for scale in ("weight_scale", "scale_weight"))
        if not scaled and (len(info.shape) != 2 or info.dtype == "I8"):
            continue
        layers[layer] = {"format": _BY_DTYPE[info.dtype], **({FULL_PRECISION: True} if full or not scaled else {})}


def _plain_weight(layer: str, conf: dict[str, Any], tensors: Mapping[str, TensorInfo],
                  where: str) -> dict[str, TensorInfo]:
    """The weight of a quantized layer with the shape that it stands for."""
    form = conf["format"]
    kind = form.removeprefix(GGUF)
    info = tensors.get(f"{layer}.weight") or tensors.get(f"{layer}.{kind}{_BLOCKS}")
    if info is None:
        raise SpecError(f"{where}: {layer} is noted as {form} and has no weight. Download the file again.")
    if form.startswith(GGUF) and kind in GGUF_TYPES and len(info.shape) == 2:
        block = GGUF_TYPES[kind]
        shape = (info.shape[0], info.shape[1] // block.type_size * block.size)
        return {f"{layer}.weight": TensorInfo(kind, shape)}
    if form not in _PACKED:
        raise SpecError(f"{where}: {layer} is quantized as {form!r}, which this version cannot read. Expected one of "
                        f"{[*_PACKED, *(GGUF + name for name in GGUF_TYPES)]}; download another file.")
    if form != "float8_e4m3fn" and form != "float8_e5m2" and not any(
            f"{layer}.{scale}" in tensors for scale in ("weight_scale", "scale_weight")):
        raise SpecError(f"{where}: {layer} is quantized as {form} and its weight_scale is missing. Download the file "
                        "again.")
    if not info.shape:
        raise SpecError(f"{where}: {layer}.weight: expected a matrix in {form}, got one value. Download it again.")
    unpacked = (*info.shape[:-1], info.shape[-1] * _PACKED[form])
    _check_scales(layer, form, unpacked, tensors, where)
    return {f"{layer}.weight": TensorInfo(info.dtype, unpacked)}


def _scale_shapes(form: str, shape: tuple[int, ...]) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that what belongs to a weight of ``shape`` [out, in] may have, by ComfyUI's names."""
    rows, columns = shape[0], math.prod(shape[1:])
    one: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    by_row: list[tuple[int, ...]] = [(rows,), (rows, *[1] * (len(shape) - 1))]
    of_weight = one + by_row
    if form in _BLOCK:  # blocks of a row, in tiles of 128 rows by 4 blocks that are filled up
        of_weight = [(-(-rows // 128) * 128, -(-columns // (4 * _BLOCK[form])) * 4)]
    return {"weight_scale": of_weight, "weight_scale_2": one, "input_scale": one, "pre_quant_scale": [(columns,)]}


def _check_scales(layer: str, form: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo],
                  where: str) -> None:
    """Refuse what would scale a weight otherwise than it was quantized, or fail in the middle of a run."""
    allowed = _scale_shapes(form, shape)
    for old, new in _COMPANIONS.items():
        got = tensors.get(f"{layer}.{old}")
        if got is not None and got.shape not in allowed[new]:
            shown = " or ".join(str(list(each)) for each in dict.fromkeys(allowed[new]))
            raise SpecError(f"{where}: {layer}.{old}: expected the shape {shown} for a weight {list(shape)} in {form}, "
                            f"got {list(got.shape)}. The file is damaged or was made by another tool; download it "
                            "again.")


def _small_tensors(file: Path, keys: list[str]) -> dict[str, bytes]:
    """The bytes of the notes beside the weights; they are a few dozen each."""
    if not keys:
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as opened:
            return {key: opened.get_tensor(key).tobytes() for key in keys}
    except SafetensorError as error:
        raise SpecError(f"{file}: its header is damaged ({error}). Download it again.") from None
