"""The CogVideoX 3D causal VAE (CogVideoX, Yang 2024, sec. 2.1), in the reference's temporal chunks.

Module names are those of diffusers' ``AutoencoderKLCogVideoX``. GroupNorm takes its statistics per chunk, so the
chunking is part of the model: two latent frames at a time when decoding and eight pixel frames when encoding, the
odd one joining the first chunk. Causal convolutions carry their last two input frames from chunk to chunk in a
``Cache`` that lives for one video. Tensors are [B, C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..specs import VAESpec

LATENT_CHUNK = 2
PIXEL_CHUNK = 8

Cache = dict[nn.Module, Tensor]


def chunk_bounds(frames: int, size: int) -> list[tuple[int, int]]:
    """The reference's chunks: ``size`` frames each, the remainder joining the first."""
    first = frames % size + (size if frames >= size else 0)
    return [(0, first)] + [(start, start + size) for start in range(first, frames, size)]


class CausalConv3d(nn.Module):
    """A convolution that sees this frame and the two before; before the first frame, the first frame repeats."""

    def __init__(self, in_channels: int, out_channels: int, factory: dict[str, Any], operations: Any,
                 kernel_size: int = 3) -> None:
        super().__init__()
        self.history = kernel_size - 1
        pad = kernel_size // 2
        self.conv = operations.Conv3d(in_channels, out_channels, kernel_size, padding=(0, pad, pad), **factory)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if self.history:
            past = cache.get(self)
            if past is None:
                past = x[:, :, :1].expand(-1, -1, self.history, -1, -1)
            x = torch.cat([past, x], dim=2)
            cache[self] = x[:, :, -self.history:].clone()
        return self.conv(x)


def _split_first(frames: int) -> bool:
    """Whether the first frame stands alone in time: it has no partner in an odd chunk."""
    return frames > 1 and frames % 2 == 1


class SpatialNorm(nn.Module):
    """GroupNorm modulated by the latent (MoVQ, Zheng 2022): norm(f) * y(z) + b(z)."""

    def __init__(self, channels: int, latent_channels: int, groups: int, factory: dict[str, Any],
                 operations: Any) -> None:
        super().__init__()
        self.norm_layer = operations.GroupNorm(groups, channels, eps=1e-6, **factory)
        self.conv_y = CausalConv3d(latent_channels, channels, factory, operations, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, factory, operations, kernel_size=1)

    def forward(self, x: Tensor, latent: Tensor, cache: Cache) -> Tensor:
        # The 1x1x1 convolutions run at latent size: they commute with nearest-neighbour upsampling.
        normed = self.norm_layer(x).mul_(_upsample_like(self.conv_y(latent, cache), x))
        return normed.add_(_upsample_like(self.conv_b(latent, cache), x))


def _upsample_like(latent: Tensor, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling of a latent to the size of ``x``; in an odd chunk the first frame stays alone."""
    if _split_first(x.shape[2]):
        size = (x.shape[2] - 1, *x.shape[3:])
        first = F.interpolate(latent[:, :, :1], size=(1, *x.shape[3:]))
        return torch.cat([first, F.interpolate(latent[:, :, 1:], size=size)], dim=2)
    return F.interpolate(latent, size=x.shape[2:])


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, spec: VAESpec, factory: dict[str, Any], operations: Any,
                 latent_channels: int | None = None) -> None:
        super().__init__()
        self.spatial = latent_channels is not None

        def norm(channels: int) -> nn.Module:
            if latent_channels is not None:
                return SpatialNorm(channels, latent_channels, spec.norm_num_groups, factory, operations)
            return operations.GroupNorm(spec.norm_num_groups, channels, eps=spec.norm_eps, **factory)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, factory, operations)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, factory, operations)
        if in_channels != out_channels:
            self.conv_shortcut = operations.Conv3d(in_channels, out_channels, 1, **factory)

    def _activated(self, norm: nn.Module, x: Tensor, latent: Tensor | None, cache: Cache) -> Tensor:
        x = norm(x, latent, cache) if self.spatial else norm(x)
        return F.silu(x, inplace=True)

    def forward(self, x: Tensor, latent: Tensor | None, cache: Cache) -> Tensor:
        hidden = self.conv1(self._activated(self.norm1, x, latent, cache), cache)
        hidden = self._activated(self.norm2, hidden, latent, cache)  # a line of its own: frees conv1's output
        hidden = self.conv2(hidden, cache)
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return hidden.add_(x)


class Resample(nn.Module):
    """A 2-D convolution on every frame, after upsampling or on the way down; in time by nearest or mean of two."""

    def __init__(self, channels: int, time: bool, factory: dict[str, Any], operations: Any, down: bool) -> None:
        super().__init__()
        self.time, self.down = time, down
        stride, padding = (2, 0) if down else (1, 1)
        self.conv = operations.Conv2d(channels, channels, 3, stride=stride, padding=padding, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self._shrink(x) if self.down else self._grow(x)
        batch = x.shape[0]
        x = self.conv(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(x, "(b t) c h w -> b c t h w", b=batch)

    def _shrink(self, x: Tensor) -> Tensor:
        if self.time and x.shape[2] > 1:
            first, rest = x[:, :, :x.shape[2] % 2], x[:, :, x.shape[2] % 2:]
            x = torch.cat([first, (rest[:, :, ::2] + rest[:, :, 1::2]) / 2], dim=2)  # avg_pool3d: no bf16 on a CPU
        return F.pad(x, (0, 1, 0, 1))  # bottom and right only, as the reference

    def _grow(self, x: Tensor) -> Tensor:
        double = (2.0 if self.time and x.shape[2] > 1 else 1.0, 2.0, 2.0)
        if self.time and _split_first(x.shape[2]):
            first = F.interpolate(x[:, :, :1], scale_factor=(1.0, 2.0, 2.0))
            return torch.cat([first, F.interpolate(x[:, :, 1:], scale_factor=double)], dim=2)
        return F.interpolate(x, scale_factor=double)


class Level(nn.Module):
    """The resnets of one resolution, and the step to the next one."""

    def __init__(self, resnets: list[ResnetBlock], resample: Resample | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if resample is not None:
            self.add_module("downsamplers" if resample.down else "upsamplers", nn.ModuleList([resample]))
        self._steps = (*resnets, *([resample] if resample else []))  # a tuple: not registered a second time

    def forward(self, x: Tensor, latent: Tensor | None, cache: Cache) -> Tensor:
        for step in self._steps:
            x = step(x) if isinstance(step, Resample) else step(x, latent, cache)
        return x


class Encoder(nn.Module):
    def __init__(self, spec: VAESpec, factory: dict[str, Any], operations: Any) -> None:
        super().__init__()
        widths = spec.block_out_channels
        time_levels = spec.temporal_compression_ratio.bit_length() - 1
        self.conv_in = CausalConv3d(spec.in_channels, widths[0], factory, operations)
        levels, previous = [], widths[0]
        for i, width in enumerate(widths):
            resnets = [ResnetBlock(previous if j == 0 else width, width, spec, factory, operations)
                       for j in range(spec.layers_per_block)]
            down = None if i == len(widths) - 1 else Resample(width, i < time_levels, factory, operations, down=True)
            levels.append(Level(resnets, down))
            previous = width
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = Level([ResnetBlock(previous, previous, spec, factory, operations) for _ in range(2)])
        self.norm_out = operations.GroupNorm(spec.norm_num_groups, previous, eps=1e-6, **factory)
        self.conv_out = CausalConv3d(previous, 2 * spec.latent_channels, factory, operations)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in(x, cache)
        for level in (*self.down_blocks, self.mid_block):
            x = level(x, None, cache)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True), cache)


class Decoder(nn.Module):
    def __init__(self, spec: VAESpec, factory: dict[str, Any], operations: Any) -> None:
        super().__init__()
        widths, latent = spec.block_out_channels[::-1], spec.latent_channels
        time_levels = spec.temporal_compression_ratio.bit_length() - 1
        self.conv_in = CausalConv3d(latent, widths[0], factory, operations)
        self.mid_block = Level([ResnetBlock(widths[0], widths[0], spec, factory, operations, latent)
                                for _ in range(2)])
        levels, previous = [], widths[0]
        for i, width in enumerate(widths):
            resnets = [ResnetBlock(previous if j == 0 else width, width, spec, factory, operations, latent)
                       for j in range(spec.layers_per_block + 1)]
            up = None if i == len(widths) - 1 else Resample(width, i < time_levels, factory, operations, down=False)
            levels.append(Level(resnets, up))
            previous = width
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out = SpatialNorm(previous, latent, spec.norm_num_groups, factory, operations)
        self.conv_out = CausalConv3d(previous, spec.out_channels, factory, operations)

    def forward(self, z: Tensor, cache: Cache) -> Tensor:
        x = self.conv_in(z, cache)
        for level in (self.mid_block, *self.up_blocks):
            x = level(x, z, cache)
        return self.conv_out(F.silu(self.norm_out(x, z, cache), inplace=True), cache)


class CogVideoXVAENetwork(nn.Module):
    """Encoder and decoder; pixels in [-1, 1], latents unscaled."""

    def __init__(self, spec: VAESpec, dtype: Any = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        self.spec = spec
        factory = {"dtype": dtype, "device": device}
        self.encoder = Encoder(spec, factory, operations)
        self.decoder = Decoder(spec, factory, operations)
        if spec.use_quant_conv:
            self.quant_conv = operations.Conv3d(2 * spec.latent_channels, 2 * spec.latent_channels, 1, **factory)
        if spec.use_post_quant_conv:
            self.post_quant_conv = operations.Conv3d(spec.latent_channels, spec.latent_channels, 1, **factory)

    def decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        """Yields the pixels of each chunk in order. z: [B, 16, T, h, w] -> [B, 3, t, 8h, 8w] in [-1, 1].

        An odd T gives 4T - 3 frames in all; an even T gives 4T, because the first frame then has a partner.
        """
        cache: Cache = {}
        for start, end in chunk_bounds(z.shape[2], LATENT_CHUNK):
            chunk = z[:, :, start:end]
            if self.spec.use_post_quant_conv:
                chunk = self.post_quant_conv(chunk)
            yield self.decoder(chunk, cache)

    def encode_chunks(self, x: Tensor, device: Any = None, dtype: Any = None) -> Iterator[Tensor]:
        """Yields the moments (mean and log variance) of each chunk. x: [B, 3, T, H, W] -> [B, 32, t, H/8, W/8].

        Only the chunk at work is moved to ``device`` and ``dtype``.
        """
        cache: Cache = {}
        for start, end in chunk_bounds(x.shape[2], PIXEL_CHUNK):
            moments = self.encoder(x[:, :, start:end].to(device=device or x.device, dtype=dtype or x.dtype), cache)
            yield self.quant_conv(moments) if self.spec.use_quant_conv else moments

    def decode(self, z: Tensor) -> Tensor:
        """Every chunk at once in memory; see ``decode_chunks``."""
        return torch.cat(list(self.decode_chunks(z)), dim=2)

    def encode(self, x: Tensor) -> Tensor:
        """The mean of the posterior: [B, 3, T, H, W] -> [B, 16, T', H/8, W/8]."""
        return torch.cat([m.chunk(2, dim=1)[0] for m in self.encode_chunks(x)], dim=2)


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles of ``tile`` begin so that they cover ``size``; the last one is moved back to end at the border."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, stride), size - tile]


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
