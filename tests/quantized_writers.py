"""Writers of quantized files for the tests, after the formats' own descriptions and not after the pack's readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Choose = Callable[[str], bool]  # which keys are quantized


def _note(**conf: object) -> Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().max() / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def _safetensors(path: Path, tensors: Tensors, choose: Choose, quantize: Callable[[str, Tensor], dict[str, Tensor]],
                 extra: Tensors | None = None, metadata: dict[str, str] | None = None) -> Path:
    from safetensors.torch import save_file

    out: dict[str, Tensor] = dict(extra or {})
    for key, value in tensors.items():
        out.update(quantize(key.removesuffix(".weight"), value) if choose(key) else {key: value})
    save_file({key: value.contiguous() for key, value in out.items()}, path, metadata=metadata)
    return path


def plain_fp8(path: Path, tensors: Tensors, choose: Choose) -> Path:
    return _safetensors(path, tensors, choose, lambda layer, w: {f"{layer}.weight": w.to(torch.float8_e4m3fn)})


def scaled_fp8(path: Path, tensors: Tensors, choose: Choose) -> Path:
    """As Comfy-Org and Kijai published it before ComfyUI noted formats."""

    def quantize(layer: str, weight: Tensor) -> dict[str, Tensor]:
        data, scale = _fp8(weight)
        return {f"{layer}.weight": data, f"{layer}.scale_weight": scale.reshape(1),
                f"{layer}.scale_input": torch.ones(1)}

    return _safetensors(path, tensors, choose, quantize, {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)})


def noted_fp8(path: Path, tensors: Tensors, choose: Choose) -> Path:
    """ComfyUI's comfy_quant beside each weight."""

    def quantize(layer: str, weight: Tensor) -> dict[str, Tensor]:
        data, scale = _fp8(weight)
        return {f"{layer}.weight": data, f"{layer}.weight_scale": scale,
                f"{layer}.comfy_quant": _note(format="float8_e4m3fn")}

    return _safetensors(path, tensors, choose, quantize)


def metadata_fp8(path: Path, tensors: Tensors, choose: Choose) -> Path:
    """ComfyUI's _quantization_metadata."""
    layers = {key.removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in tensors if choose(key)}

    def quantize(layer: str, weight: Tensor) -> dict[str, Tensor]:
        data, scale = _fp8(weight)
        return {f"{layer}.weight": data, f"{layer}.weight_scale": scale}

    notes = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return _safetensors(path, tensors, choose, quantize, metadata=notes)


def rows_fp8(path: Path, tensors: Tensors, choose: Choose, dtype: torch.dtype = torch.float8_e4m3fn) -> Path:
    """fp8 with a scale for each row, as vLLM's and torchao's tools write it."""

    def quantize(layer: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        return {f"{layer}.weight": (weight.float() / scale).to(dtype), f"{layer}.weight_scale": scale}

    return _safetensors(path, tensors, choose, quantize)


def plain_int8(path: Path, tensors: Tensors, choose: Choose) -> Path:
    """int8 and a scale per row, with no note of a tool."""

    def quantize(layer: str, weight: Tensor) -> dict[str, Tensor]:
        data, scale = _int8(weight)
        return {f"{layer}.weight": data, f"{layer}.weight_scale": scale}

    return _safetensors(path, tensors, choose, quantize)


def blocks_in_safetensors(path: Path, tensors: Tensors, choose: Choose) -> Path:
    """GGUF blocks under names of their own, as in Kijai/CogVideoX_GGUF."""

    def quantize(layer: str, weight: Tensor) -> dict[str, Tensor]:
        return {f"{layer}.Q4_0_qweight": torch.from_numpy(packed(weight.float().numpy(), "Q4_0"))}

    return _safetensors(path, tensors, choose, quantize)


def write_gguf(path: Path, tensors: Tensors, choose: Choose, type_name: str = "Q8_0",
               architecture: str = "cogvideox", metadata: dict[str, str] | None = None) -> Path:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    for name, text in (metadata or {}).items():
        writer.add_string(name, text)
    for key, value in tensors.items():
        array = value.detach().float().numpy()
        if choose(key):
            writer.add_tensor(key, packed(array, type_name), raw_dtype=GGMLQuantizationType[type_name])
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(array: np.ndarray, type_name: str) -> np.ndarray:
    """uint8 [rows, bytes]: the gguf package packs the simple types; it only unpacks the K types."""
    from gguf import GGMLQuantizationType, quants

    if type_name not in K_PACKERS:
        return quants.quantize(np.ascontiguousarray(array), GGMLQuantizationType[type_name])
    blocks = array.reshape(-1, 256).astype(np.float32)
    return np.stack([K_PACKERS[type_name](block) for block in blocks]).reshape(array.shape[0], -1)


def _half(value: float) -> np.ndarray:
    return np.array([value], np.float16).view(np.uint8)


def _k_scales(block: np.ndarray, levels: int) -> tuple[np.float32, np.float32, list[int], list[int], np.ndarray]:
    """d, dmin, the 6-bit scales and minimums of eight parts of 32, and the values 0..levels."""
    parts = block.reshape(8, 32)
    low = np.minimum(parts.min(1), 0)
    widths = (np.maximum(parts.max(1), 0) - low) / levels
    d, dmin = np.float16(max(widths.max(), 1e-8) / 63), np.float16(max(-low.min(), 1e-8) / 63)
    scales = [int(x) for x in np.clip(np.rint(widths / np.float32(d)), 0, 63)]
    mins = [int(x) for x in np.clip(np.rint(-low / np.float32(dmin)), 0, 63)]
    values = np.zeros((8, 32), np.int32)
    for j in range(8):
        step = np.float32(d) * scales[j]
        values[j] = np.clip(np.rint((parts[j] + np.float32(dmin) * mins[j]) / step), 0, levels) if step else 0
    return d, dmin, scales, mins, values


def _k_bytes(scales: list[int], mins: list[int]) -> np.ndarray:
    """ggml's 12 bytes: the last four parts' low bits in bytes 8..11, their high bits on top of bytes 0..7."""
    out = np.zeros(12, np.uint8)
    for j in range(4):
        out[j] = scales[j] | (scales[j + 4] >> 4) << 6
        out[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6
        out[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4
    return out


def _nibbles(values: np.ndarray) -> np.ndarray:
    return np.concatenate([(values[j] & 15) | (values[j + 1] & 15) << 4 for j in range(0, 8, 2)]).astype(np.uint8)


def _pack_q4_k(block: np.ndarray) -> np.ndarray:
    d, dmin, scales, mins, values = _k_scales(block, 15)
    return np.concatenate([_half(d), _half(dmin), _k_bytes(scales, mins), _nibbles(values)])


def _pack_q5_k(block: np.ndarray) -> np.ndarray:
    d, dmin, scales, mins, values = _k_scales(block, 31)
    high = np.zeros(32, np.uint8)
    for j in range(8):
        high |= ((values[j] >> 4) << j).astype(np.uint8)
    return np.concatenate([_half(d), _half(dmin), _k_bytes(scales, mins), high, _nibbles(values)])


def _pack_q6_k(block: np.ndarray) -> np.ndarray:
    parts = block.reshape(16, 16)
    widths = np.abs(parts).max(1) / 31
    d = np.float16(max(widths.max(), 1e-8) / 127)
    scales = np.clip(np.rint(widths / np.float32(d)), 0, 127)
    steps = np.where(scales > 0, np.float32(d) * scales, 1)
    values = (np.clip(np.rint(parts / steps[:, None]), -32, 31).astype(np.int32) + 32).reshape(256)
    low, high = np.zeros(128, np.uint8), np.zeros(64, np.uint8)
    for half in range(2):
        q = values[128 * half:128 * half + 128]
        for i in range(32):
            a, b, c, e = q[i], q[i + 32], q[i + 64], q[i + 96]
            low[64 * half + i] = (a & 15) | (c & 15) << 4
            low[64 * half + i + 32] = (b & 15) | (e & 15) << 4
            high[32 * half + i] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6
    return np.concatenate([low, high, scales.astype(np.int8).view(np.uint8), _half(d)])


K_PACKERS = {"Q4_K": _pack_q4_k, "Q5_K": _pack_q5_k, "Q6_K": _pack_q6_k}
