"""Where each token is: sinusoidal embeddings, rotary embeddings, and the grids they are computed on.

Source: CogVideoX (Yang 2024), sec. 2.2 (3D-RoPE); the formulas and their rounding are those of diffusers, so that
a model sees the positions it was trained with. Pure torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..specs import TransformerSpec

ROPE_THETA = 10000.0

PLACE_KEY = "cogx_place"  # in transformer_options: the Place of a context window that keeps its video's positions
RIFLEX_KEY = "cogx_riflex"  # likewise: the Riflex of a MODEL


@dataclass(frozen=True)
class Place:
    """Where a context window lies: its latent frames in a video of ``total`` of them, 1.5's padding frames included."""

    frames: tuple[int, ...]
    total: int

    def tokens(self, patch: int) -> list[int]:
        """The positions in time of the window's tokens, of ``patch`` latent frames each."""
        return [frame // patch for frame in self.frames[::patch]]


@dataclass(frozen=True)
class Riflex:
    """RIFLEx (Zhao 2025, arXiv 2502.15894): one frequency of time is lowered, so that it does not complete its period.

    Attributes:
        k: which frequency, counted from 1, as in the paper.
        tuned: the positions in time that the weights were fine-tuned for; 0 for weights that were not.
    """

    k: int
    tuned: int = 0

    def lowered(self, frequencies: Tensor, count: int) -> Tensor:
        """``frequencies`` [N] for ``count`` positions in time: eq. 8 with the 0.9 of the authors' code.

        Without fine-tuning they are left alone where the positions fit into one period, as in ``cogvideox.py`` of the
        authors' repository.
        """
        if not self.tuned and count <= rounded_periods(2 * len(frequencies))[self.k - 1]:
            return frequencies
        frequencies = frequencies.clone()
        frequencies[self.k - 1] = 0.9 * 2 * math.pi / (self.tuned or count)
        return frequencies


def rounded_periods(dim: int) -> list[int]:
    """Positions after which each of the dim/2 frequencies repeats, as the authors' ``identify_k`` rounds them."""
    return [round(2 * math.pi * ROPE_THETA ** (i / dim)) for i in range(0, dim, 2)]


def intrinsic_frequency(spec: TransformerSpec, trained: int) -> int:
    """RIFLEx' k for a model that was trained on ``trained`` positions in time, counted from 1.

    The frequency whose period is nearest to the position at which a longer video is first seen to repeat (eq. 7). The
    authors look for it at twice the trained length (26 for CogVideoX, 66 for HunyuanVideo).
    """
    periods = rounded_periods(spec.attention_head_dim // 4)
    return min(range(len(periods)), key=lambda i: abs(periods[i] - 2 * trained)) + 1


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


def _whole_time(spec: TransformerSpec, frames: int, place: Place | None) -> int:
    """Positions in time of the whole video."""
    return frames if place is None else place.total // spec.temporal_patch


def _placed(time: Tensor, spec: TransformerSpec, place: Place | None) -> Tensor:
    """What belongs to the tokens of a window, of ``time`` [T, ...] for the whole video."""
    return time if place is None else time[place.tokens(spec.temporal_patch)]


def sincos_axes(spec: TransformerSpec, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype,
                place: Place | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of the 3D sincos embedding for a token grid (T, H, W): [T, D/4], [W, 3D/8], [H, 3D/8].

    A token's embedding is the concatenation of its time, column and row part, in this order.
    """
    frames, rows, columns = grid
    spatial = 3 * spec.hidden_size // 4 // 2

    def axis(dim: int, count: int, scale: float) -> Tensor:
        return _sincos_axis(dim, torch.arange(count, device=device, dtype=torch.float32) / scale).to(dtype)

    time = axis(spec.hidden_size // 4, _whole_time(spec, frames, place), spec.temporal_interpolation_scale)
    return (_placed(time, spec, place),
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


def rope_grid(spec: TransformerSpec, grid: tuple[int, int, int], device: torch.device,
              place: Place | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of a token grid (T, H, W) along each axis, fp32.

    1.5 counts integers. 1.0 stretches the grid over the native one, cropped to the aspect, as diffusers does.
    """
    frames, rows, columns = grid
    frames = _whole_time(spec, frames, place)
    if spec.patch_size_t is not None:
        time = torch.arange(frames, device=device, dtype=torch.float32)
        return (_placed(time, spec, place), torch.arange(rows, device=device, dtype=torch.float32),
                torch.arange(columns, device=device, dtype=torch.float32))
    start, stop = _crop_region(rows, columns, spec.sample_height // spec.patch_size,
                               spec.sample_width // spec.patch_size)

    def axis(first: int, last: int, count: int) -> Tensor:
        return torch.linspace(first, last * (count - 1) / count, count, device=device, dtype=torch.float32)

    time = _placed(axis(0, frames, frames), spec, place)
    return time, axis(start[0], stop[0], rows), axis(start[1], stop[1], columns)


def time_frequencies(spec: TransformerSpec, frames: int, device: torch.device, riflex: Riflex | None,
                     place: Place | None = None) -> Tensor:
    """RoPE's frequencies of time for ``frames`` positions, or those of the whole video: [head_dim/8], fp32."""
    frequencies = _frequencies(spec.attention_head_dim // 4, device)
    return frequencies if riflex is None else riflex.lowered(frequencies, _whole_time(spec, frames, place))


def rope_matrices(spec: TransformerSpec, positions: tuple[Tensor, Tensor, Tensor], text_tokens: int,
                  time_freqs: Tensor | None = None) -> Tensor:
    """Rotation matrices of the joint sequence, text first: [1, text + T*H*W, 1, head_dim/2, 2, 2], fp32.

    Text tokens have no position: the identity. The layout is the one that ComfyUI's ``apply_rope1`` takes.
    ``time_freqs``: ``time_frequencies``, where they are not the usual ones.
    """
    time, rows, columns = positions
    space = _frequencies(spec.attention_head_dim // 8 * 3, time.device)
    if time_freqs is None:
        time_freqs = _frequencies(spec.attention_head_dim // 4, time.device)
    # RoFormer (Su 2021), eq. 15
    t, h, w = torch.outer(time, time_freqs), torch.outer(rows, space), torch.outer(columns, space)
    shape = (len(time), len(rows), len(columns))
    angles = torch.cat([
        t[:, None, None].expand(*shape, -1),
        h[None, :, None].expand(*shape, -1),
        w[None, None, :].expand(*shape, -1),
    ], dim=-1).flatten(0, 2)
    angles = torch.cat([angles.new_zeros(text_tokens, angles.shape[1]), angles])
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]


def _frequencies(dim: int, device: torch.device) -> Tensor:
    """[dim/2], fp32, the highest first."""
    return 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def turned(x: Tensor, matrices: Tensor) -> Tensor:
    """``x`` [B, S, N, D] turned by ``rope_matrices``, as ComfyUI's ``apply_rope1`` does it; computed in their dtype."""
    first, second = x.to(matrices.dtype).unflatten(-1, (-1, 1, 2)).unbind(-1)
    return (matrices[..., 0] * first + matrices[..., 1] * second).flatten(-2).type_as(x)
