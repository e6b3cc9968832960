"""The block formats of GGUF in torch: from packed bytes to values, and back where a LoRA is merged into them.

The formats are those of ggml (its ``ggml-common.h``; the ``gguf`` package reads them in numpy, and the tests compare
the values bit by bit). A block is a row of bytes: ``blocks`` is uint8 [n, bytes], values are fp32 [n, block size].
Pure: torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of the IQ4 formats
_CHUNK = 2**22  # values that are unpacked at once: the temporaries are several times as large as the result


@dataclass(frozen=True)
class BlockFormat:
    """``size`` values in ``type_size`` bytes. ``pack`` takes values and how to round them to whole numbers."""

    size: int
    type_size: int
    unpack: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def dequantize(data: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """uint8 [rows, bytes] to ``dtype`` [rows, values]."""
    form = FORMATS[name]
    rows, width = data.shape[0], data.shape[1] // form.type_size * form.size
    out = torch.empty(rows, width, dtype=dtype, device=data.device)
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        blocks = data[start:start + step].reshape(-1, form.type_size)
        out[start:start + step] = form.unpack(blocks).reshape(-1, width)
    return out


def quantize(values: Tensor, name: str, seed: int = 0) -> Tensor:
    """[rows, values] to uint8 [rows, bytes]. Each block gets the scale of its largest value.

    ``seed`` above 0 rounds up or down by chance, so that a change smaller than a step is not lost on average.
    """
    form = FORMATS[name]
    generator = torch.Generator(device=values.device).manual_seed(seed) if seed else None
    rounded = torch.round if generator is None else partial(_by_chance, generator)
    rows, width = values.shape
    step = max(1, _CHUNK // width)
    packed = [form.pack(values[start:start + step].reshape(-1, form.size).float(), rounded)
              for start in range(0, rows, step)]
    return torch.cat(packed).reshape(rows, -1)


def _by_chance(generator: torch.Generator, x: Tensor) -> Tensor:
    return torch.floor(x + torch.rand(x.shape, generator=generator, device=x.device))


def _fields(data: Tensor, bits: int, group: int) -> Tensor:
    """Bytes [n, k] to their bit fields [n, k / group, 8 / bits, group]: the lowest bits of a group come first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    return (data.reshape(data.shape[0], -1, 1, group) >> shifts) & (2**bits - 1)


def _pack_fields(values: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of ``_fields``: whole numbers [n, ...] to bytes [n, k]."""
    count = 8 // bits
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=values.device)[:, None]
    fields = values.to(torch.int32).reshape(values.shape[0], -1, count, group)
    return (fields << shifts).sum(2).to(torch.uint8).flatten(1)


def _half(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).float()


def _half_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float16).contiguous().view(torch.uint8)


def _split(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return blocks.split(list(sizes), dim=1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _stored(scale: Tensor) -> Tensor:
    """The scale as its 16 bits hold it: what is divided by must be what is multiplied with later."""
    return scale.to(torch.float16).float()


def _extreme(x: Tensor) -> Tensor:
    """The value of the largest magnitude, with its sign: [..., 1]."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


# --- Blocks of 32: one scale, and a minimum in the _1 formats ---


def _unpack_legacy(bits: int, with_minimum: bool, blocks: Tensor) -> Tensor:
    sizes = [2, *([2] if with_minimum else []), *([4] if bits == 5 else []), 16]
    scale, *rest = _split(blocks, *sizes)
    q = _fields(rest[-1], 4, 16).flatten(1)
    if bits == 5:
        q = q | (_fields(rest[-2], 1, 1).flatten(1) << 4)
    if with_minimum:
        return _half(scale) * q.float() + _half(rest[0])
    return _half(scale) * (q.to(torch.int8) - 2**(bits - 1)).float()


def _pack_legacy(bits: int, with_minimum: bool, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    top = 2**bits - 1
    if with_minimum:
        low = _stored(x.amin(-1, keepdim=True))
        scale = _stored((x.amax(-1, keepdim=True) - low) / top)
        parts = [_half_bytes(scale), _half_bytes(low)]
        q = rounded((x - low) * _inverse(scale))
    else:
        scale = _stored(_extreme(x) / -2**(bits - 1))
        parts = [_half_bytes(scale)]
        q = rounded(x * _inverse(scale)) + 2**(bits - 1)
    q = q.clamp(0, top).to(torch.int32)
    if bits == 5:
        parts.append(_pack_fields(q >> 4, 1, 1))
    return torch.cat([*parts, _pack_fields(q & 15, 4, 16)], dim=1)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    scale, q = _split(blocks, 2, 32)
    return q.contiguous().view(torch.int8).float() * _half(scale)


def _pack_q8_0(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    scale = _stored(x.abs().amax(-1, keepdim=True) / 127)
    q = rounded(x * _inverse(scale)).clamp(-127, 127).to(torch.int8)
    return torch.cat([_half_bytes(scale), q.view(torch.uint8)], dim=1)


def _nearest_code(x: Tensor) -> Tensor:
    codes = torch.tensor(_CODEBOOK, dtype=torch.float32, device=x.device)
    return torch.bucketize(x.contiguous(), (codes[1:] + codes[:-1]) / 2)


def _codes(indices: Tensor) -> Tensor:
    return torch.tensor(_CODEBOOK, dtype=torch.float32, device=indices.device)[indices.long()]


def _unpack_iq4_nl(blocks: Tensor) -> Tensor:
    scale, q = _split(blocks, 2, 16)
    return _half(scale) * _codes(_fields(q, 4, 16).flatten(1))


def _pack_iq4_nl(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    scale = _stored(_extreme(x) / _CODEBOOK[0])
    return torch.cat([_half_bytes(scale), _pack_fields(_nearest_code(x * _inverse(scale)), 4, 16)], dim=1)


# --- Blocks of 256 ("K"): parts of 16 or 32 values, each with a scale of a few bits of its own ---


def _scaled_parts(part_scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales [n, parts] as the block's own scale [n, 1] and whole numbers -top..top."""
    whole = _stored(part_scales.abs().amax(-1, keepdim=True) / top)
    return whole, torch.round(part_scales * _inverse(whole)).clamp(-top, top)


def _pack_ranges(x: Tensor, part: int, top: int, scale_top: int, rounded: Callable[[Tensor], Tensor],
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scale, minimum, their whole numbers per part, and q 0..top [n, parts, part] of x = scale q - minimum."""
    parts = x.reshape(x.shape[0], -1, part)
    low = parts.amin(-1).clamp(max=0)
    d, scales = _scaled_parts((parts.amax(-1).clamp(min=0) - low) / top, scale_top)
    dmin, mins = _scaled_parts(-low, scale_top)
    q = rounded((parts + (dmin * mins)[..., None]) * _inverse(d * scales)[..., None]).clamp(0, top)
    return d, dmin, scales, mins, q.to(torch.int32)


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    scales, qs, d, dmin = _split(blocks, 16, 64, 2, 2)
    q = _fields(qs, 2, 32).reshape(-1, 16, 16).float()
    scale, low = _half(d) * (scales & 15).float(), _half(dmin) * (scales >> 4).float()
    return (scale[..., None] * q - low[..., None]).flatten(1)


def _pack_q2_k(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    d, dmin, scales, mins, q = _pack_ranges(x, 16, 3, 15, rounded)
    both = (scales.to(torch.int32) | (mins.to(torch.int32) << 4)).to(torch.uint8)
    return torch.cat([both, _pack_fields(q, 2, 32), _half_bytes(d), _half_bytes(dmin)], dim=1)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    hmask, qs, scales, d = _split(blocks, 32, 64, 12, 2)
    low, high = _split(scales, 8, 4)
    scale = (_fields(low, 4, 8).flatten(1) | (_fields(high, 2, 4).flatten(1) << 4)).to(torch.int8) - 32
    missing = (_fields(hmask, 1, 32) ^ 1).reshape(-1, 16, 16)  # the mask says where 4 is not subtracted
    q = _fields(qs, 2, 32).reshape(-1, 16, 16).to(torch.int8) - (missing << 2).to(torch.int8)
    return ((_half(d) * scale.float())[..., None] * q.float()).flatten(1)


def _pack_q3_k(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    parts = x.reshape(x.shape[0], 16, 16)
    d, scales = _scaled_parts(_extreme(parts)[..., 0] / -4, 31)
    q = rounded(parts * _inverse(d * scales)[..., None]).clamp(-4, 3).to(torch.int32) + 4
    stored = scales.to(torch.int32) + 32
    packed = [_pack_fields(q >> 2, 1, 32), _pack_fields(q & 3, 2, 32), _pack_fields(stored & 15, 4, 8),
              _pack_fields(stored >> 4, 2, 4), _half_bytes(d)]
    return torch.cat(packed, dim=1)


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minimums of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    first, second, mixed = _split(data, 4, 4, 4)
    scales = torch.cat([first & 63, (mixed & 15) | ((first >> 2) & 48)], dim=1)
    mins = torch.cat([second & 63, (mixed >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), mins.float()


def _pack_six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    s, m = scales.to(torch.int32), mins.to(torch.int32)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    mixed = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([first, second, mixed], dim=1).to(torch.uint8)


def _unpack_ranges_k(bits: int, blocks: Tensor) -> Tensor:
    d, dmin, packed, *high, qs = _split(blocks, 2, 2, 12, *([32] if bits == 5 else []), 128)
    scales, mins = _six_bits(packed)
    q = _fields(qs, 4, 32).reshape(-1, 8, 32)
    if high:
        q = q | (_fields(high[0], 1, 32).reshape(-1, 8, 32) << 4)
    scale, low = _half(d) * scales, _half(dmin) * mins
    return (scale[..., None] * q.float() - low[..., None]).flatten(1)


def _pack_ranges_k(bits: int, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    d, dmin, scales, mins, q = _pack_ranges(x, 32, 2**bits - 1, 63, rounded)
    high = [_pack_fields(q >> 4, 1, 32)] if bits == 5 else []
    return torch.cat([_half_bytes(d), _half_bytes(dmin), _pack_six_bits(scales, mins), *high,
                      _pack_fields(q & 15, 4, 32)], dim=1)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = _split(blocks, 128, 64, 16, 2)
    q = _fields(low, 4, 64).reshape(-1, 8, 32) | (_fields(high, 2, 32).reshape(-1, 8, 32) << 4)
    scale = _half(d) * scales.contiguous().view(torch.int8).float()
    return (scale[..., None] * (q.to(torch.int8) - 32).reshape(-1, 16, 16).float()).flatten(1)


def _pack_q6_k(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    parts = x.reshape(x.shape[0], 16, 16)
    d, scales = _scaled_parts(_extreme(parts)[..., 0] / -32, 127)
    q = rounded(parts * _inverse(d * scales)[..., None]).clamp(-32, 31).to(torch.int32) + 32
    return torch.cat([_pack_fields(q & 15, 4, 64), _pack_fields(q >> 4, 2, 32),
                      scales.to(torch.int8).view(torch.uint8), _half_bytes(d)], dim=1)


def _unpack_iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, qs = _split(blocks, 2, 2, 4, 128)
    scales = (_fields(low, 4, 1).flatten(1) | (_fields(high, 2, 1).flatten(1) << 4)).to(torch.int8) - 32
    return ((_half(d) * scales.float())[..., None] * _codes(_fields(qs, 4, 16).reshape(-1, 8, 32))).flatten(1)


def _pack_iq4_xs(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    parts = x.reshape(x.shape[0], 8, 32)
    d, scales = _scaled_parts(_extreme(parts)[..., 0] / _CODEBOOK[0], 31)
    q = _nearest_code(parts * _inverse(d * scales)[..., None])
    stored = scales.to(torch.int32) + 32
    return torch.cat([_half_bytes(d), _pack_fields(stored >> 4, 2, 1), _pack_fields(stored & 15, 4, 1),
                      _pack_fields(q, 4, 16)], dim=1)


def _legacy(bits: int, with_minimum: bool, type_size: int) -> BlockFormat:
    return BlockFormat(32, type_size, partial(_unpack_legacy, bits, with_minimum),
                       partial(_pack_legacy, bits, with_minimum))


FORMATS = {
    "Q4_0": _legacy(4, False, 18),
    "Q4_1": _legacy(4, True, 20),
    "Q5_0": _legacy(5, False, 22),
    "Q5_1": _legacy(5, True, 24),
    "Q8_0": BlockFormat(32, 34, _unpack_q8_0, _pack_q8_0),
    "Q2_K": BlockFormat(256, 84, _unpack_q2_k, _pack_q2_k),
    "Q3_K": BlockFormat(256, 110, _unpack_q3_k, _pack_q3_k),
    "Q4_K": BlockFormat(256, 144, partial(_unpack_ranges_k, 4), partial(_pack_ranges_k, 4)),
    "Q5_K": BlockFormat(256, 176, partial(_unpack_ranges_k, 5), partial(_pack_ranges_k, 5)),
    "Q6_K": BlockFormat(256, 210, _unpack_q6_k, _pack_q6_k),
    "IQ4_NL": BlockFormat(32, 18, _unpack_iq4_nl, _pack_iq4_nl),
    "IQ4_XS": BlockFormat(256, 136, _unpack_iq4_xs, _pack_iq4_xs),
}
