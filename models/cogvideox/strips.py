"""The VAE's convolutions in horizontal strips: exact, and in little memory.

A strip is a band of rows over all frames of a chunk. Each pass goes down its input once: the strip is normalised into
a window, below the last two rows of the strip above, and the convolution of the window gives the rows that are now
complete, one row behind the input. So no row is normalised or convolved twice, the output may overwrite the input,
and the height of the strips changes the memory and not the picture. GroupNorm's statistics are those of the whole
chunk: they are taken strip by strip while the values are written, and combined (Chan 1983).

Passes read and write strips of [C, T, rows, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fields import Field, Places, Rows, Run, Size
from .vae_plan import HISTORY, shrunk_frames

CARRIED = 2  # rows that a window takes over from the strip above

Sink = Callable[[int, Tensor], None]  # the first row, and the rows
Prepare = Callable[[Tensor, Rows, Tensor], None]  # raw rows, where they are, and the part of the window to fill


class Statistics:
    """Mean and variance of each group of channels, from strips."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, rows: Tensor) -> None:
        """rows: [C, T, rows, W], contiguous."""
        # In fp32, because var_mean of bf16 values returns bf16.
        var, mean = torch.var_mean(rows.reshape(self._groups, -1).float(), dim=1, correction=0)
        self._parts.append((rows.shape[2], mean, var))

    def combined(self) -> tuple[Tensor, Tensor]:
        """Mean and variance over all strips: [groups] each, fp32."""
        counts, means, variances = zip(*self._parts, strict=True)
        mean, var = torch.stack(means), torch.stack(variances)
        share = torch.tensor(counts, dtype=torch.float32, device=mean.device)[:, None] / sum(counts)
        whole = (share * mean).sum(0)
        # Of the distances from the common mean: a plain sum of squares loses the digits of a small variance.
        return whole, (share * (var + (mean - whole) ** 2)).sum(0)


Norm = Callable[[Run, Any, Statistics], Prepare]


def held(module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias on the device for a whole pass, wherever ComfyUI keeps them."""
    import comfy.ops

    weight, bias, stream = comfy.ops.cast_bias_weight(module, dtype=dtype, device=device, bias_dtype=dtype,
                                                      offloadable=True)
    try:
        if module.weight.device != device or hasattr(module, "_v"):  # memory that the next layer's weights may take
            return weight.clone(), bias if bias is None else bias.clone()
        return weight, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _segments(frames: int, latents: int) -> list[tuple[slice, slice]]:
    """Which frames belong to which latent frames: the first of an odd chunk stands alone, the others share evenly."""
    if frames > 1 and frames % 2:
        return [(slice(0, 1), slice(0, 1)), (slice(1, None), slice(1, None))]
    return [(slice(None), slice(None))]


def group_norm(run: Run, norm: Any, statistics: Statistics) -> Prepare:
    """GroupNorm and SiLU."""
    scale, shift = (t[:, None, None, None] for t in _affine(run, norm, statistics))

    def prepare(raw: Tensor, rows: Rows, out: Tensor) -> None:
        F.silu(torch.addcmul(shift, raw, scale, out=out), inplace=True)

    return prepare


def _affine(run: Run, norm: Any, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """GroupNorm as a scale and a shift per channel: [C] each, fp32."""
    weight, bias = held(norm, run.device, torch.float32)
    mean, var = statistics.combined()
    spread = weight.shape[0] // mean.shape[0]
    scale = weight * (var + norm.eps).rsqrt().repeat_interleave(spread)
    return scale, bias - mean.repeat_interleave(spread) * scale


def spatial_norm(run: Run, norm: Any, statistics: Statistics) -> Prepare:
    """SpatialNorm and SiLU: GroupNorm modulated by the latent, norm(f) * y(z) + b(z) (MoVQ, Zheng 2022).

    Both 1x1x1 convolutions and the norm fold into one map of scales and one of shifts. They are computed at latent
    size, because such convolutions commute with nearest-neighbour upsampling, and kept in fp32.
    """
    latent = run.latent
    assert latent is not None  # the decoder sets it
    scale, shift = _affine(run, norm.norm_layer, statistics)
    (wy, by), (wb, bb) = (held(conv.conv, run.device, torch.float32) for conv in (norm.conv_y, norm.conv_b))
    wy, wb = wy.flatten(1), wb.flatten(1)
    weight = torch.cat([scale[:, None] * wy, shift[:, None] * wy + wb])
    bias = torch.cat([scale * by, shift * by + bb])[:, None]

    def prepare(raw: Tensor, rows: Rows, out: Tensor) -> None:
        factor = raw.shape[3] // latent.shape[3]
        z = latent[:, :, rows[0] // factor:rows[1] // factor]
        maps = torch.addmm(bias, weight, z.flatten(1)).view(2, -1, *z.shape[1:])
        scales, shifts = maps.repeat_interleave(factor, dim=-1) if factor > 1 else maps
        for frames, latents in _segments(raw.shape[1], z.shape[1]):
            n = z[:, latents].shape[1]
            values, target = (t[:, frames].unflatten(1, (n, -1)).unflatten(3, (-1, factor)) for t in (raw, out))
            torch.addcmul(shifts[:, latents, None, :, None], values, scales[:, latents, None, :, None], out=target)
        F.silu(out, inplace=True)

    return prepare


def _plain(raw: Tensor, rows: Rows, out: Tensor) -> None:
    out.copy_(raw)


@dataclass(frozen=True)
class Windowing:
    """How strips become windows: rows made of one input row, zero rows above the first, shape of a window."""

    gain: int
    zeros_above: int
    shape: Callable[[int], tuple[int, ...]]


def _window_maker(run: Run, source: Field, parts: list[Rows], how: Windowing,
                  prepare: Prepare) -> Callable[[Rows], Tensor]:
    """A function that makes the window of each strip in turn: the last two prepared rows of the strip above, this
    strip, and zeros outside the image. It keeps no window, so that one is free once it is convolved."""
    reader = source.read(parts)
    carried: Tensor | None = None

    def make(part: Rows) -> Tensor:
        nonlocal carried
        run.checkpoint()
        run.link.keep_pace()
        above = how.zeros_above if carried is None else CARRIED
        bottom = above + (part[1] - part[0]) * how.gain
        below = 1 if part[1] == source.rows else 0
        window = run.empty(*how.shape(bottom + below))
        window[..., :above, :] = 0 if carried is None else carried
        window[..., bottom:, :] = 0
        prepare(next(reader), part, window[..., above:bottom, :])
        carried = None if below else window[..., -CARRIED:, :].clone()
        return window

    return make


def convolve(run: Run, causal: Any, source: Field, sink: Sink, prepare: Prepare = _plain,
             see_raw: Sink | None = None) -> None:
    """A causal convolution: the two frames before this chunk come from the cache, or are the first frame.

    causal: a ``CausalConv3d``. sink takes the convolved rows in order; see_raw the source's rows as they are, before
    any row of their strip is written.
    """
    parts = run.parts(source)
    weight, bias = held(causal.conv, run.device, run.dtype)
    before = run.caches.pop(causal, None)
    alone = before is None and source.frames == 1 and run.last
    history = 0 if alone else HISTORY
    if alone:
        weight = weight.sum(2, keepdim=True)  # it would see the same frame three times
    if not run.last:
        run.caches[causal] = before or run.field(source.channels, Size(HISTORY, source.rows, source.width),
                                                 causal if run.plan.host_caches else None)
    cached = before.read(parts) if before else None

    def fill(raw: Tensor, part: Rows, out: Tensor) -> None:
        prepare(raw, part, out[:, history:])
        if see_raw:
            see_raw(part[0], raw)
        if history:
            out[:, :history] = next(cached) if cached else out[:, history:history + 1]
        if not run.last:
            run.caches[causal].write(part[0], out[:, -HISTORY:])

    how = Windowing(1, 1, lambda rows: (source.channels, history + source.frames, rows, source.width))
    window = _window_maker(run, source, parts, how, fill)
    first = 0
    for part in parts:
        rows = causal.conv._conv_forward(window(part)[None], weight, bias)[0]
        sink(first, rows)
        first += rows.shape[2]
        del rows  # before the next window is made


def _resample(run: Run, conv: Any, source: Field, sink: Callable[[int, Tensor], None], how: Windowing,
              prepare: Prepare, frames: list[int]) -> None:
    """A 2-D convolution of each frame: windows are [T, C, rows, W]. frames: which of them the output consists of."""
    parts = run.parts(source, how.gain > 1)
    weight, bias = held(conv, run.device, run.dtype)
    window = _window_maker(run, source, parts, how, prepare)
    index = torch.tensor(frames, device=run.device)
    first = 0
    for part in parts:
        rows = conv._conv_forward(window(part), weight, bias).transpose(0, 1).index_select(1, index)  # tcrw -> ctrw
        sink(first, rows)
        first += rows.shape[2]
        del rows


def upsample(run: Run, conv: Any, source: Field, time: bool, sink: Sink) -> None:
    """Nearest-neighbour doubling, in time too, and a 2-D convolution. Frames that are equal are convolved once."""
    double = time and source.frames > 1
    alone = source.frames % 2 if double else 0
    frames = [*range(alone), *(t for t in range(alone, source.frames) for _ in range(1 + double))]

    def prepare(raw: Tensor, part: Rows, out: Tensor) -> None:
        target = out.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        target.copy_(raw.transpose(0, 1)[:, :, :, None, :, None])  # ctrw -> tcrw

    how = Windowing(2, 1, lambda rows: (source.frames, source.channels, rows, 2 * source.width))
    _resample(run, conv, source, sink, how, prepare, frames)


def downsample(run: Run, conv: Any, source: Field, time: bool, sink: Sink) -> None:
    """Mean of two frames where time shrinks, zeros below and at the right only, and a 2-D convolution of stride 2."""
    halve = time and source.frames > 1
    alone = source.frames % 2 if halve else source.frames
    count = shrunk_frames(source.frames, time)

    def prepare(raw: Tensor, part: Rows, out: Tensor) -> None:
        raw, body = raw.transpose(0, 1), out[..., :-1]  # ctrw -> tcrw
        body[:alone] = raw[:alone]
        if halve:
            # avg_pool3d has no bf16 on a CPU
            torch.add(raw[alone::2], raw[alone + 1::2], out=body[alone:]).mul_(0.5)
        out[..., -1] = 0

    how = Windowing(1, 0, lambda rows: (count, source.channels, rows, source.width + 1))
    _resample(run, conv, source, sink, how, prepare, list(range(count)))


def resnet(run: Run, block: Any, places: Places, statistics: Statistics,
           norm: Norm) -> Statistics:
    """A residual block from x to out. Takes the statistics of x and returns those of the result."""
    inner, after = Statistics(run.groups), Statistics(run.groups)
    keep = _keeper(run, block, places) if places.residual is not places.x else None

    def inside(first: int, rows: Tensor) -> None:
        places.h.write(first, rows)
        inner.add(rows)

    convolve(run, block.conv1, places.x, inside, norm(run, block.norm1, statistics), keep)
    parts = run.parts(places.h)
    remains = places.residual.read([(start - (start > 0), end - (end < places.h.rows)) for start, end in parts])

    def add(first: int, rows: Tensor) -> None:
        rows.add_(next(remains))
        places.out.write(first, rows)
        after.add(rows)

    convolve(run, block.conv2, places.h, add, norm(run, block.norm2, inner))
    return after


def _keeper(run: Run, block: Any, places: Places) -> Sink:
    """What saves the residual before x is overwritten: as it is, or through the 1x1x1 convolution of the shortcut."""
    if not hasattr(block, "conv_shortcut"):
        return places.residual.write
    weight, bias = held(block.conv_shortcut, run.device, run.dtype)
    weight, bias = weight.flatten(1), bias[None, :, None]

    def keep(first: int, raw: Tensor) -> None:
        rows = raw.permute(2, 0, 1, 3).flatten(2)  # ctrw -> rc(tw), as it lies in memory: a convolution would copy it
        out = torch.baddbmm(bias, weight.expand(rows.shape[0], -1, -1), rows).unflatten(2, (raw.shape[1], -1))
        places.residual.write(first, out.permute(1, 2, 0, 3))  # rctw -> ctrw

    return keep


def into(field: Field, statistics: Statistics) -> Sink:
    """A sink that writes to a field and takes the statistics of what it writes."""
    def sink(first: int, rows: Tensor) -> None:
        field.write(first, rows)
        statistics.add(rows)

    return sink


def convolved(run: Run, causal: Any, source: Field, prepare: Prepare) -> Tensor:
    """The last convolution, which has few channels: all its rows, [C, T, rows, W]."""
    out = run.empty(causal.conv.out_channels, source.frames, source.rows, source.width)

    def sink(first: int, rows: Tensor) -> None:
        out[:, :, first:first + rows.shape[2]] = rows

    convolve(run, causal, source, sink, prepare)
    return out


def pointwise(run: Run, conv: Any, x: Tensor) -> Tensor:
    """A 1x1x1 convolution of something small: [B, C, T, rows, W]."""
    weight, bias = held(conv, run.device, run.dtype)
    return conv._conv_forward(x, weight, bias)
