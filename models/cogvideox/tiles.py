"""Spatial tiles: less memory, and another picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles of ``tile`` begin so that they cover ``size``; the last one is moved back to end at the border."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, stride), size - tile]


def count_tiles(size: Sequence[int], tile: tuple[int, int], overlap: int) -> int:
    """How many tiles cover rows and columns."""
    return math.prod(len(tile_starts(n, t, t - overlap)) for n, t in zip(size, tile, strict=True))


def _ramp(length: int, fade_in: int, fade_out: int, like: Tensor) -> Tensor:
    weight = torch.ones(length, device=like.device, dtype=torch.float32)
    if fade_in:
        weight[:fade_in] *= torch.linspace(0, 1, fade_in + 2, device=like.device)[1:-1]
    if fade_out:
        weight[-fade_out:] *= torch.linspace(1, 0, fade_out + 2, device=like.device)[1:-1]
    return weight


def blend_tiles(z: Tensor, tile: tuple[int, int], overlap: int, ratio: float,
                run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run spatial tiles over all frames and blend their overlaps linearly.

    z: [B, C, T, H, W]; ``tile`` (rows, columns) and ``overlap`` in units of z; ``ratio`` output per input pixel.
    Lossy: every tile has its own GroupNorm statistics (FACTS 2.11). The result is fp32 on the CPU.
    """
    rows = tile_starts(z.shape[3], tile[0], tile[0] - overlap)
    columns = tile_starts(z.shape[4], tile[1], tile[1] - overlap)
    out = weight = None
    for top in rows:
        for left in columns:
            part = run(z[:, :, :, top:top + tile[0], left:left + tile[1]]).float().cpu()
            y, x = round(top * ratio), round(left * ratio)
            h, w = part.shape[3:]
            if out is None or weight is None:
                size = round(z.shape[3] * ratio), round(z.shape[4] * ratio)
                out = part.new_zeros(*part.shape[:3], *size)
                weight = part.new_zeros(size)
            fade = round(overlap * ratio)
            mask = (_ramp(h, fade if top else 0, fade if top != rows[-1] else 0, part)[:, None]
                    * _ramp(w, fade if left else 0, fade if left != columns[-1] else 0, part)[None])
            out[..., y:y + h, x:x + w] += part * mask
            weight[y:y + h, x:x + w] += mask
    assert out is not None and weight is not None  # there is always one tile
    return out.div_(weight)
