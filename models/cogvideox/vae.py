"""The CogVideoX 3D causal VAE (CogVideoX, Yang 2024, sec. 2.1), in the reference's temporal chunks.

Module names are those of diffusers' ``AutoencoderKLCogVideoX``. GroupNorm takes its statistics per chunk, so the
chunking is part of the model: two latent frames at a time when decoding and eight pixel frames when encoding, the
odd one joining the first chunk. Causal convolutions remember their last two input frames from chunk to chunk. Inside
a chunk everything is computed in strips (strips.py), in the memory that a ``Plan`` takes.

Videos are [B, C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import VAESpec
from . import strips
from .fields import Arena, Checkpoint, Field, MakeHost, Prepare, Room, Run, Size, as_it_is, in_ram, nothing, room_beside
from .strips import Norm, Statistics
from .vae_plan import HOST, LATENT_CHUNK, PIXEL_CHUNK, UNSPLIT, Plan, chunk_bounds, grown_frames, shrunk_frames


class CausalConv3d(nn.Module):
    """A convolution that sees this frame and the two before; before the first frame, the first frame repeats.

    Rows above and below are the business of strips.py, so only columns are padded here.
    """

    def __init__(self, in_channels: int, out_channels: int, factory: dict[str, Any], operations: Any,
                 kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = operations.Conv3d(in_channels, out_channels, kernel_size, padding=(0, 0, kernel_size // 2),
                                      **factory)


class SpatialNorm(nn.Module):
    """GroupNorm modulated by the latent (MoVQ, Zheng 2022): norm(f) * y(z) + b(z). See ``strips.spatial_norm``."""

    def __init__(self, channels: int, latent_channels: int, groups: int, factory: dict[str, Any],
                 operations: Any) -> None:
        super().__init__()
        self.norm_layer = operations.GroupNorm(groups, channels, eps=1e-6, **factory)
        self.conv_y = CausalConv3d(latent_channels, channels, factory, operations, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, factory, operations, kernel_size=1)


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut. See ``strips.resnet``."""

    def __init__(self, in_channels: int, out_channels: int, spec: VAESpec, factory: dict[str, Any], operations: Any,
                 latent_channels: int | None = None) -> None:
        super().__init__()

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


class Resample(nn.Module):
    """A 2-D convolution on every frame. See ``strips.upsample`` and ``strips.downsample``."""

    def __init__(self, channels: int, time: bool, factory: dict[str, Any], operations: Any, down: bool) -> None:
        super().__init__()
        self.time, self.down = time, down
        stride, padding = (2, 0) if down else (1, (0, 1))
        self.conv = operations.Conv2d(channels, channels, 3, stride=stride, padding=padding, **factory)


class Level(nn.Module):
    """The resnets of one resolution, and the step to the next one."""

    def __init__(self, resnets: list[ResnetBlock], resample: Resample | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if resample is not None:
            self.add_module("downsamplers" if resample.down else "upsamplers", nn.ModuleList([resample]))
        self._step = (resample,)  # a tuple: not registered a second time

    @property
    def step(self) -> Resample | None:
        return self._step[0]

    def forward(self, run: Run, room: Room, statistics: Statistics, norm: Norm) -> tuple[Field, Statistics]:
        """The resnets: from the room's x to the field that is returned, with its statistics."""
        x = room.x
        for block in self.resnets:
            places = room.places(x, hasattr(block, "conv_shortcut"))
            statistics = strips.resnet(run, block, places, statistics, norm)
            x = places.out
        return x, statistics


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
        self.widths = widths

    def forward(self, run: Run, pixels: Tensor) -> Tensor:
        """A chunk: [3, T, H, W] -> moments [32, t, h, w]."""
        source = Field(pixels.permute(2, 0, 1, 3))  # cthw -> hctw
        x, statistics = run.level_field("x", self.widths[0], source), Statistics(run.groups)
        strips.convolve(run, self.conv_in, source, strips.into(x, statistics))
        for i, (width, level) in enumerate(zip(self.widths, self.down_blocks, strict=True)):
            x, statistics = level(run, room_beside(run, x, width, full_size=i == 0), statistics, strips.group_norm)
            if level.step is not None:
                x, statistics = self._down(run, level.step, x)
        x, statistics = self.mid_block(run, room_beside(run, x, x.channels), statistics, strips.group_norm)
        return strips.convolved(run, self.conv_out, x, strips.group_norm(run, self.norm_out, statistics))

    def _down(self, run: Run, step: Resample, x: Field) -> tuple[Field, Statistics]:
        smaller = Size(shrunk_frames(x.frames, step.time), x.rows // 2, x.width // 2)
        out, statistics = run.level_field("x", x.channels, smaller), Statistics(run.groups)
        strips.downsample(run, step.conv, x, step.time, strips.into(out, statistics))
        return out, statistics


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
        self.widths = widths

    def forward(self, run: Run, z: Tensor) -> Tensor:
        """A chunk: [16, t, h, w] -> pixels [3, T, H, W]."""
        run.latent = z.float()
        source = Field(z.permute(2, 0, 1, 3))  # cthw -> hctw
        x, statistics = run.level_field("x", self.widths[0], source), Statistics(run.groups)
        strips.convolve(run, self.conv_in, source, strips.into(x, statistics))
        room = room_beside(run, x, self.widths[0])
        x, statistics = self.mid_block(run, room, statistics, strips.spatial_norm)
        sizes = self._sizes(source)
        arena = None
        for i, level in enumerate(self.up_blocks):
            x, statistics = level(run, room, statistics, strips.spatial_norm)
            if level.step is not None:
                del room  # its other fields are free from here on
                room, arena = self._room(run, i + 1, sizes, arena)
                statistics = Statistics(run.groups)
                strips.upsample(run, level.step.conv, x, level.step.time, strips.into(room.x, statistics))
                del x
        return strips.convolved(run, self.conv_out, x, strips.spatial_norm(run, self.norm_out, statistics))

    def _sizes(self, latent: Field) -> list[Size]:
        sizes = [Size(latent.frames, latent.rows, latent.width)]
        for level in self.up_blocks:
            if level.step is not None:
                last = sizes[-1]
                sizes.append(Size(grown_frames(last.frames, level.step.time), 2 * last.rows, 2 * last.width))
        return sizes

    def _room(self, run: Run, i: int, sizes: list[Size], arena: Arena | None) -> tuple[Room, Arena | None]:
        """Room for level ``i``, and the memory of the last level once that is there."""
        before, channels, last = self.widths[i - 1], self.widths[i], len(sizes) - 1
        if run.plan.values != HOST and i >= last - 1:
            arena = arena or Arena(run, self.widths[last - 1], self.widths[last], sizes[last])
            room = arena.room() if i == last else arena.lend(before, channels, sizes[i])
            if room is not None:
                return room, arena
        return room_beside(run, run.level_field("x", before, sizes[i]), channels), arena


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

    @torch.no_grad()
    def decode_chunks(self, z: Tensor, plan: Plan = UNSPLIT, make_host: MakeHost = in_ram,
                      checkpoint: Checkpoint = nothing) -> Iterator[Tensor]:
        """Yields the pixels of each chunk in order. z: [1, 16, T, h, w] -> [1, 3, t, 8h, 8w] in [-1, 1].

        An odd T gives 4T - 3 frames in all; an even T gives 4T, because the first frame then has a partner.
        """
        run = Run(plan, z.device, z.dtype, z.shape[4] * self.spec.spatial_ratio, self.spec, make_host, checkpoint)
        for chunk in run.chunks(z, chunk_bounds(z.shape[2], LATENT_CHUNK)):
            if self.spec.use_post_quant_conv:
                chunk = strips.pointwise(run, self.post_quant_conv, chunk)
            yield self.decoder(run, chunk[0])[None]

    @torch.no_grad()
    def encode_chunks(self, x: Tensor, plan: Plan = UNSPLIT, make_host: MakeHost = in_ram,
                      checkpoint: Checkpoint = nothing, device: Any = None,
                      dtype: torch.dtype | None = None, prepare: Prepare = as_it_is) -> Iterator[Tensor]:
        """Yields the moments (mean and log variance) of each chunk. x: [1, 3, T, H, W] -> [1, 32, t, H/8, W/8].

        Only the chunk at work goes through ``prepare``, and is moved to ``device`` and ``dtype``.
        """
        run = Run(plan, torch.device(device or x.device), dtype or x.dtype, x.shape[4], self.spec, make_host,
                  checkpoint)
        for chunk in run.chunks(x, chunk_bounds(x.shape[2], PIXEL_CHUNK), prepare):
            moments = self.encoder(run, chunk[0])[None]
            yield strips.pointwise(run, self.quant_conv, moments) if self.spec.use_quant_conv else moments

    def decode(self, z: Tensor, plan: Plan = UNSPLIT) -> Tensor:
        """Every chunk at once in memory; see ``decode_chunks``. Any batch."""
        return torch.cat([torch.cat(list(self.decode_chunks(one, plan)), dim=2) for one in z.split(1)])

    def encode(self, x: Tensor, plan: Plan = UNSPLIT) -> Tensor:
        """The mean of the posterior: [B, 3, T, H, W] -> [B, 16, T', H/8, W/8]."""
        moments = torch.cat([torch.cat(list(self.encode_chunks(one, plan)), dim=2) for one in x.split(1)])
        return moments.chunk(2, dim=1)[0]
