"""Quantized weights in ComfyUI: which layers, which formats, and the layers that hold them.

The formats are ComfyUI's own (``comfy.quant_ops``, through comfy_kitchen), and so are the layers
(``comfy.ops.mixed_precision_ops``): LoRA, partial loading and streaming work as for its own models. GGUF blocks are one
layout per type more, held by a linear layer that unpacks them for each use.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor

from ..models.specs import SpecError
from . import gguf_blocks
from .quantized_files import FULL_PRECISION, GGUF, Described, Layers, StoredWeight

log = logging.getLogger("cogx")

# The one table of what is quantized: the large products of every block. Norms with their modulations, embeddings, and
# the patch and output projections stay in high precision; together they are few, and every token passes through them.
QUANTIZED_LAYERS = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"),
    "text_encoder": re.compile(r"encoder\.block\.\d+\.layer\.(0\.SelfAttention\.[qkvo]|1\.DenseReluDense\.w[io]\w*)"),
}
# Two-dimensional weights that are no linear layer: a lookup reads them row by row.
_TABLES = re.compile(r"shared|encoder\.embed_tokens|.*\.relative_attention_bias")

_BLACKWELL = "an NVIDIA card of the Blackwell generation (compute capability 10.0, such as the RTX 50 series)"
_ROWS = 128  # rows that are quantized at once: few, for the temporaries; scales of mxfp8 and nvfp4 lie in tiles of 128


@dataclasses.dataclass(frozen=True)
class Format:
    """A choice of the input ``quantization``. ``multiple``: what rows and columns of a weight must be divisible by."""

    algorithm: str  # ComfyUI's name, in QUANT_ALGOS
    conf: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the layout's ``quantize``
    multiple: int = 1
    largest: float | None = None  # the value that a weight's largest is scaled to, where the whole weight has one scale
    comfyui: str = "0.24"
    support: str | None = None  # the question to comfy.model_management whether the card has it


_E5M2_MAX, _E4M3_MAX, _E2M1_MAX = 57344.0, 448.0, 6.0
FORMATS = {
    "fp8_e4m3fn": Format("float8_e4m3fn", conf={FULL_PRECISION: True}, largest=_E4M3_MAX),
    "fp8_scaled": Format("float8_e4m3fn", largest=_E4M3_MAX),
    "int8": Format("int8_tensorwise", options={"per_channel": True}, comfyui="0.30"),
    "mxfp8": Format("mxfp8", multiple=32, support="supports_mxfp8_compute"),
    "nvfp4": Format("nvfp4", multiple=16, largest=_E4M3_MAX * _E2M1_MAX, support="supports_nvfp4_compute"),
}
_LARGEST_FP8 = {"float8_e4m3fn": _E4M3_MAX, "float8_e5m2": _E5M2_MAX}


# --- What this ComfyUI and this card can do ---


def check_quantization(name: str, layers: Layers) -> None:
    """Refuse a choice of ``quantization`` that cannot be carried out. ``layers`` is what the file holds already.

    Raises:
        SpecError: this ComfyUI or card lacks the format, or the file is quantized otherwise.
    """
    if name == "none":
        return
    form = FORMATS[name]
    _check_kitchen(f"quantization {name}")
    _check_host(f"quantization {name}", form.algorithm, form.comfyui)
    device = comfy.model_management.get_torch_device()
    if form.support and not getattr(comfy.model_management, form.support)(device):
        others = [other for other, each in FORMATS.items() if not each.support]
        raise SpecError(f"quantization {name}: expected {_BLACKWELL}, got {_device_name(device)}. Choose one of "
                        f"{others}.")
    held = sorted({conf["format"] for conf in layers.values()} - {form.algorithm})
    if held:
        raise SpecError(f"quantization {name}: the file is quantized already ({', '.join(held)}), and quantizing it "
                        "again only loses quality. Choose none, or an unquantized file.")


def check_stored(source: Described, where: str) -> None:
    """Refuse a file in a format that this ComfyUI does not have, or with scales that it would leave out.

    Raises:
        SpecError: names the ComfyUI, or the package, that it needs.
    """
    needs = {form.algorithm: form.comfyui for form in FORMATS.values()}
    for stored in sorted({conf["format"] for conf in source.layers.values()}):
        _check_kitchen(f"{where}, which is quantized as {stored}")
        if stored.startswith(GGUF):
            continue
        _check_host(f"{where}, which is quantized as {stored}", stored, needs.get(stored, "0.30"))
    for layer, names in source.companions.items():
        stored = source.layers[layer]["format"]
        read = set(comfy.quant_ops.QUANT_ALGOS.get(stored, {}).get("parameters", ()))  # none beside GGUF blocks
        # Where it is not read, what comes in is not quantized with it either.
        unread = sorted(names - read - {"input_scale"})
        if unread:
            raise SpecError(f"{where}: {layer} has a {unread[0]}, which this ComfyUI does not apply to {stored}, so "
                            f"that the weights would be wrong. Expected {sorted(read)}. Update ComfyUI, or take "
                            "another file.")


def _check_kitchen(what: str) -> None:
    """Without comfy-kitchen, or with one that is too old for it, ComfyUI runs with stand-ins for all its layouts."""
    if comfy.quant_ops.get_layout_class("TensorCoreFP8E4M3Layout") is None:
        try:
            found = version("comfy-kitchen")
        except PackageNotFoundError:
            found = "none"
        raise SpecError(f"{what}: expected the Python package comfy-kitchen that ComfyUI's requirements.txt names, got "
                        f"{found}. Run pip install -r requirements.txt in ComfyUI's folder, with the Python that runs "
                        "it, or take an unquantized model.")


def _check_host(what: str, algorithm: str, needed: str) -> None:
    if algorithm not in comfy.quant_ops.QUANT_ALGOS:
        from comfyui_version import __version__

        raise SpecError(f"{what}: expected ComfyUI {needed} or newer, with the comfy-kitchen of its requirements; got "
                        f"{__version__}. Update ComfyUI, or choose another format.")


def described(layers: Layers) -> str:
    """Formats and layer counts in words; empty if nothing is quantized."""
    counts = Counter(conf["format"] for conf in layers.values())
    return "".join(f", {count} layers in {form}" for form, count in sorted(counts.items()))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device}"


# --- Tensors ---


def prepared(pieces: Iterable[tuple[str, Tensor | StoredWeight]], component: str, quantization: str,
             dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of ``pieces`` as the layers of ``operations`` load it, quantized weight by weight where asked.

    ``pieces`` are taken one by one, so that no copy of the model is in memory while it is quantized.
    """
    out: dict[str, Tensor] = {}
    form = FORMATS.get(quantization)
    rescaled = 0
    for key, value in pieces:
        layer = key.removesuffix(".weight")
        if isinstance(value, StoredWeight) and not is_linear(key, value.shape):
            value = dequantized(value, dtype).reshape(value.shape)
        elif isinstance(value, StoredWeight) and _is_fp8_by_row(value):
            value, rescaled = _with_one_scale(value), rescaled + 1
        elif form and not isinstance(value, StoredWeight) and wants(component, key, value.shape, form):
            value = quantized(value, form)
        out.update(value.entries(layer) if isinstance(value, StoredWeight) else {key: value})
    if rescaled:
        log.warning("%d layers are fp8 with a scale for each row, which ComfyUI does not compute with: rounded again "
                    "with one scale for each weight. An int8 or unquantized file loses nothing.", rescaled)
    return out


def _is_fp8_by_row(weight: StoredWeight) -> bool:
    return weight.conf["format"] in _LARGEST_FP8 and weight.companions["weight_scale"].numel() > 1


def _with_one_scale(weight: StoredWeight) -> StoredWeight:
    """ComfyUI's fp8 layers take one scale: of several, a GPU refuses them in the run, or reads the first for all."""
    name = weight.conf["format"]
    form = Format(name, conf=weight.conf, largest=_LARGEST_FP8[name])
    again = quantized(dequantized(weight, torch.float32), form)
    return dataclasses.replace(again, companions={**weight.companions, **again.companions})


def is_linear(key: str, shape: tuple[int, ...]) -> bool:
    """Whether ``key`` is the weight of a linear layer: such a layer can hold it quantized."""
    return key.endswith(".weight") and len(shape) == 2 and not _TABLES.fullmatch(key.removesuffix(".weight"))


def wants(component: str, key: str, shape: tuple[int, ...], form: Format) -> bool:
    """Whether the table quantizes the weight ``key`` of ``component``."""
    fits = not any(length % form.multiple for length in shape)
    return key.endswith(".weight") and fits and bool(
        QUANTIZED_LAYERS[component].fullmatch(key.removesuffix(".weight")))


def quantized(weight: Tensor, form: Format) -> StoredWeight:
    """``weight`` [out, in] in ``form``, on the CPU; made on the GPU if there is one, some rows at a time."""
    layout = comfy.quant_ops.get_layout_class(comfy.quant_ops.QUANT_ALGOS[form.algorithm]["comfy_tensor_layout"])
    device = comfy.model_management.get_torch_device()
    options = dict(form.options)
    if form.largest is not None:
        largest = torch.stack([rows.to(device).abs().amax().float() for rows in weight.split(_ROWS)]).amax()
        options["scale"] = largest.clamp(min=1e-30) / form.largest
    whole, scales = None, {}
    for start, rows in zip(range(0, weight.shape[0], _ROWS), weight.split(_ROWS), strict=True):
        data, params = layout.quantize(rows.to(device=device, dtype=torch.float32), **options)
        tensors = layout.state_dict_tensors(data, params)
        data = tensors.pop("")
        if whole is None:
            whole = torch.empty(weight.shape[0], data.shape[1], dtype=data.dtype)
        whole[start:start + len(rows)] = data.to("cpu")
        for suffix, scale in tensors.items():
            scales.setdefault(f"weight{suffix}", []).append(scale.to("cpu"))
    # A scale of the whole weight is the same in every part.
    companions = {key: as_bytes(torch.cat(parts) if parts[0].dim() else parts[0]) for key, parts in scales.items()}
    return StoredWeight({"format": form.algorithm, **form.conf}, whole, companions, tuple(weight.shape))


def as_bytes(scale: Tensor) -> Tensor:
    """A scale as it is stored: not every reader of safetensors, ComfyUI's among them, knows e8m0."""
    return scale.view(torch.uint8) if scale.dtype == getattr(torch, "float8_e8m0fnu", None) else scale


def dequantized(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The values that a quantized weight stands for, as ComfyUI's own layer reads them: [out, in]."""
    if weight.conf["format"].startswith(GGUF):
        return gguf_blocks.dequantize(weight.data, weight.conf["format"].removeprefix(GGUF), dtype)
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    weight = dataclasses.replace(weight, data=weight.data.flatten(1))
    layer = operations(dtype).Linear(columns, rows, bias=False, dtype=dtype)
    layer.load_state_dict({key.removeprefix("layer."): value for key, value in weight.entries("layer").items()})
    return smoothed(layer.weight.dequantize(), weight.companions.get("pre_quant_scale"))


def smoothed(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``weight`` [out, in] with what ComfyUI's layer multiplies its input by: ``pre_quant_scale`` [in], or None."""
    return weight if scale is None else weight * scale.to(device=weight.device, dtype=weight.dtype)


# --- Layers ---


def operations(dtype: torch.dtype, full_precision: bool = False) -> Any:
    """ComfyUI's mixed precision layers, whose linear layers take GGUF blocks too, and scale what they multiply in fp8.

    ``dtype`` is what unquantized weights are held in and quantized ones are unpacked to; ``full_precision`` unpacks
    even where the card could multiply quantized values.
    """
    management = comfy.model_management
    device = management.get_torch_device()
    supported = {"float8_e4m3fn": management.supports_fp8_compute, "mxfp8": management.supports_mxfp8_compute,
                 "nvfp4": management.supports_nvfp4_compute}
    emulated = {name for name, supports in supported.items() if not supports(device)}
    emulated.add("float8_e5m2")  # no card multiplies it by itself, and two bits are too few for what is multiplied
    host = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=full_precision, disabled=emulated)

    class Operations(host):
        class Linear(host.Linear):
            def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
                note = state_dict.get(f"{prefix}comfy_quant")
                form = json.loads(note.numpy().tobytes()).get("format", "") if note is not None else ""
                if not form.startswith(GGUF):
                    super()._load_from_state_dict(state_dict, prefix, *args)
                    return
                del state_dict[f"{prefix}comfy_quant"]
                self._hold(state_dict.pop(f"{prefix}weight"), form)
                torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
                missing_keys = args[2]
                missing_keys.remove(f"{prefix}weight")

            def _hold(self, blocks: Tensor, form: str) -> None:
                from .gguf_layout import LAYOUTS, GGUFParams

                self.quant_format, self.layout_type = form, LAYOUTS[form]
                self._full_precision_mm = True  # activations are never packed
                params = GGUFParams(None, self.factory_kwargs["dtype"], self._orig_shape)
                tensor = comfy.quant_ops.QuantizedTensor(blocks.to(self.factory_kwargs["device"]), self.layout_type,
                                                         params)
                self.weight = torch.nn.Parameter(tensor, requires_grad=False)

            def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if not self._multiplies_unscaled_fp8(input):
                    return super().forward(input, *args, **kwargs)
                # ComfyUI would cut what lies beyond 448; the inner values of a feed-forward can.
                scale = input.abs().amax().float().clamp(min=1e-12) / _E4M3_MAX
                rows = comfy.quant_ops.QuantizedTensor.from_float(input.flatten(0, -2), self.layout_type, scale=scale)
                return super().forward(rows, *args, **kwargs).unflatten(0, input.shape[:-1])

            def _multiplies_unscaled_fp8(self, input: Tensor) -> bool:
                return (getattr(self, "quant_format", None) == "float8_e4m3fn" and not self._full_precision_mm
                        and not getattr(self, "comfy_force_cast_weights", False) and not input.requires_grad
                        and not self.weight_function and not self.bias_function
                        and getattr(self, "input_scale", None) is None
                        and getattr(self, "pre_quant_scale", None) is None)

    return Operations
