"""GGUF blocks as a layout of ComfyUI's quantized tensors, one for each type.

Apart from ``quantization.py`` because it needs comfy-kitchen when it is imported, and unquantized models do not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, register_layout_class
from torch import Tensor

from . import gguf_blocks
from .quantized_files import GGUF


@dataclasses.dataclass(frozen=True)
class GGUFParams(BaseLayoutParams):
    """GGUF blocks carry their scales themselves."""

    scale: None

    def _tensor_fields(self) -> list[str]:
        return []


class GGUFLayout(QuantizedLayout):
    """GGUF blocks: uint8 [out, bytes]. One subclass per type, because ComfyUI re-quantizes by the layout alone."""

    Params = GGUFParams
    type_name = ""

    @classmethod
    def quantize(cls, tensor: Tensor, scale: Any = None, stochastic_rounding: int | None = 0,
                 inplace_ops: bool = False, **kwargs: Any) -> tuple[Tensor, GGUFParams]:
        blocks = gguf_blocks.quantize(tensor, cls.type_name, stochastic_rounding or 0)
        return blocks, GGUFParams(None, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: Tensor, params: GGUFParams) -> Tensor:
        return gguf_blocks.dequantize(qdata, cls.type_name, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: GGUFParams) -> dict[str, Tensor]:
        return {"": qdata}


def _register() -> dict[str, str]:
    """One layout per GGUF type; returns their names by the format of the layer."""
    names = {}
    for type_name in gguf_blocks.FORMATS:
        name = f"CogXGGUF{type_name}Layout"
        register_layout_class(name, type(name, (GGUFLayout,), {"type_name": type_name}))
        names[GGUF + type_name] = name
    return names


LAYOUTS = _register()
