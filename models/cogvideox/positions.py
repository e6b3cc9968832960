"""Where each token is: sinusoidal embeddings, rotary embeddings, and the grids they are computed on.

Source: CogVideoX (Yang 2024), sec. 2.2 (3D-RoPE); the formulas and their rounding are those of diffusers, so that
a model sees the positions it was trained with. Pure torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..specs import TransformerSpec

ROPE_THETA = 10000.0


def timestep_embedding(timestep: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sinusoidal embedding of timesteps (DDPM, Ho 2020). [B] -> [B, dim], fp32."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - freq_shift)
    angles = timestep[:, None].float() * exponent.exp()[None]
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)


def _sincos_axis(dim: int, positions: Tensor) -> Tensor:
    """[N] -> [N, dim]. float64 where the device has it, as in the reference."""
    precision = torch.float32 if positions.device.type == "mps" else torch.float64
    omega = torch.arange(dim // 2, device=positions.device, dtype=precision) / (dim / 2.0)
    angles = torch.outer(positions.to(precision), 1.0 / 10000**omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_axes(spec: TransformerSpec, grid: tuple[int, int, int], device: torch.device,
                dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of the 3D sincos embedding for a token grid (T, H, W): [T, D/4], [W, 3D/8], [H, 3D/8].

    A token's embedding is the concatenation of its time, column and row part, in this order.
    """
    frames, rows, columns = grid
    spatial = 3 * spec.hidden_size // 4 // 2

    def axis(dim: int, count: int, scale: float) -> Tensor:
        return _sincos_axis(dim, torch.arange(count, device=device, dtype=torch.float32) / scale).to(dtype)

    return (axis(spec.hidden_size // 4, frames, spec.temporal_interpolation_scale),
            axis(spatial, columns, spec.spatial_interpolation_scale),
            axis(spatial, rows, spec.spatial_interpolation_scale))


def _crop_region(rows: int, columns: int, base_rows: int, base_columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a grid of another aspect lies on the base grid, as (top, left), (bottom, right): centred, scaled to fit."""
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2.0), round((base_columns - width) / 2.0)
    return (top, left), (top + height, left + width)


def rope_grid(spec: TransformerSpec, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of a token grid (T, H, W) along each axis, fp32.

    1.5 counts integers. 1.0 stretches the grid over the native one, cropped to the aspect, as diffusers does.
    """
    frames, rows, columns = grid
    time = torch.arange(frames, device=device, dtype=torch.float32)
    if spec.patch_size_t is not None:
        return (time, torch.arange(rows, device=device, dtype=torch.float32),
                torch.arange(columns, device=device, dtype=torch.float32))
    start, stop = _crop_region(rows, columns, spec.sample_height // spec.patch_size,
                               spec.sample_width // spec.patch_size)

    def axis(first: int, last: int, count: int) -> Tensor:
        return torch.linspace(first, last * (count - 1) / count, count, device=device, dtype=torch.float32)

    return axis(0, frames, frames), axis(start[0], stop[0], rows), axis(start[1], stop[1], columns)


def rope_matrices(spec: TransformerSpec, positions: tuple[Tensor, Tensor, Tensor], text_tokens: int) -> Tensor:
    """Rotation matrices of the joint sequence, text first: [1, text + T*H*W, 1, head_dim/2, 2, 2], fp32.

    Text tokens have no position: the identity. The layout is the one that ComfyUI's ``apply_rope1`` takes.
    """
    time, rows, columns = positions
    head_dim = spec.attention_head_dim
    dims = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    t, h, w = (_rope_angles(dim, axis) for dim, axis in zip(dims, (time, rows, columns), strict=True))
    shape = (len(time), len(rows), len(columns))
    angles = torch.cat([
        t[:, None, None].expand(*shape, -1),
        h[None, :, None].expand(*shape, -1),
        w[None, None, :].expand(*shape, -1),
    ], dim=-1).flatten(0, 2)
    angles = torch.cat([angles.new_zeros(text_tokens, angles.shape[1]), angles])
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]


def _rope_angles(dim: int, positions: Tensor) -> Tensor:
    """RoFormer (Su 2021), eq. 15: [N] -> [N, dim/2]."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return torch.outer(positions, 1.0 / ROPE_THETA**exponent)
