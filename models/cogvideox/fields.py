"""Where the VAE keeps the values of a chunk: fields on the device or in host memory, and the room of each level.

A field is [rows, C, T, W], so that a strip of rows is one block of memory: it travels to the host and back in one
copy, and a field with smaller rows can grow over one that is read from the top.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import VAESpec
from .vae_plan import HOST, PARKED, Plan

STRIPS_AHEAD = 2

Rows = tuple[int, int]
MakeHost = Callable[[tuple[int, ...], torch.dtype], Tensor]
Checkpoint = Callable[[], None]
Prepare = Callable[[Tensor], Tensor]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all copies: torch keeps the memory that a stream has used for that stream alone."""
    return torch.cuda.Stream(device)


class HostLink:
    """Copies between the device and host memory, on a CUDA device beside the computation on a stream of their own.

    One stream keeps their order: what a later pass fetches has been stored before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _side_stream(device) if device.type == "cuda" else None
        self._begun: deque[tuple[Any, Any]] = deque()

    def keep_pace(self) -> None:
        """Called once per strip. Lets the program run two strips ahead of the device and no further: what is on its
        way takes memory."""
        if self._stream is None:
            return
        self._begun.append((torch.cuda.current_stream(self.device).record_event(), self._stream.record_event()))
        if len(self._begun) > STRIPS_AHEAD:
            for event in self._begun.popleft():
                event.synchronize()

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def fetch(self, source: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy to the device: the copy, and what ``arrived`` waits for."""
        with self._beside():
            copy = torch.empty(source.shape, dtype=source.dtype, device=self.device)
            copy.copy_(source, non_blocking=self._stream is not None)
            return copy, self._stream.record_event() if self._stream else None

    def arrived(self, copy: Tensor, event: Any) -> Tensor:
        """The copy, once it is complete for what is computed from here on."""
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            copy.record_stream(current)
        return copy

    def store(self, target: Tensor, values: Tensor) -> None:
        """Copy to host memory, after what is being computed."""
        # A copy, because the rows of a field may be overwritten before they have left.
        values = values.clone(memory_format=torch.contiguous_format)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            values.record_stream(self._stream)
        with self._beside():
            target.copy_(values, non_blocking=self._stream is not None)

    def finish(self) -> None:
        """Wait until the host memory may be given back."""
        if self._stream:
            self._stream.synchronize()


class Field:
    """Values of a chunk, [rows, C, T, W], on the device or, with a link, in host memory."""

    def __init__(self, values: Tensor, link: HostLink | None = None) -> None:
        self.values = values
        self._link = link

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    @property
    def frames(self) -> int:
        return self.values.shape[2]

    @property
    def width(self) -> int:
        return self.values.shape[3]

    def read(self, parts: Sequence[Rows]) -> Iterator[Tensor]:
        """The rows of each part on the device: [C, T, rows, W]. From host memory the next part is on its way."""
        if self._link is None:
            for start, end in parts:
                yield self.values[start:end].permute(1, 2, 0, 3)  # rctw -> ctrw
            return
        fetched = deque([self._link.fetch(self.values[slice(*parts[0])])])
        for following in [*parts[1:], None]:
            if following:
                fetched.append(self._link.fetch(self.values[slice(*following)]))
            yield self._link.arrived(*fetched.popleft()).permute(1, 2, 0, 3)  # rctw -> ctrw

    def write(self, start: int, rows: Tensor) -> None:
        """rows: [C, T, rows, W] on the device."""
        target, rows = self.values[start:start + rows.shape[2]], rows.permute(2, 0, 1, 3)  # ctrw -> rctw
        if self._link is None:
            target.copy_(rows)
        else:
            self._link.store(target, rows)


def in_ram(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def nothing() -> None:
    pass


def as_it_is(chunk: Tensor) -> Tensor:
    return chunk


@dataclass
class Run:
    """One video on its way through the network: the plan, and what its passes share.

    Attributes:
        width: of the video, in pixels.
        make_host: gives host memory of a shape and dtype. checkpoint: called once per strip, may raise.
        caches: the last frames that each causal convolution saw in the chunk before.
        last: no chunk follows, so nothing need be remembered. latent: [16, t, h, w] of this chunk in fp32.
    """

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    width: int
    spec: VAESpec
    make_host: MakeHost = in_ram
    checkpoint: Checkpoint = nothing
    caches: dict[nn.Module, Field] = field(default_factory=dict)
    last: bool = False
    latent: Tensor | None = None

    def __post_init__(self) -> None:
        self.link = HostLink(self.device)
        self._host: dict[Any, Tensor] = {}

    @property
    def groups(self) -> int:
        return self.spec.norm_num_groups

    def chunks(self, video: Tensor, bounds: list[Rows], prepare: Prepare = as_it_is) -> Iterator[Tensor]:
        """The chunks of a video, each prepared and moved to the device in its turn."""
        try:
            for start, end in bounds:
                self.last = end == bounds[-1][1]
                yield prepare(video[:, :, start:end]).to(device=self.device, dtype=self.dtype)
        finally:
            self.link.finish()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def field(self, channels: int, like: Field | Size, role: Any = None) -> Field:
        """New values of the size of ``like``; with a role in host memory, which the next chunk uses again."""
        shape = like.rows, channels, like.frames, like.width
        return Field(self.empty(*shape)) if role is None else Field(self._in_host(role, shape), self.link)

    def level_field(self, name: str, channels: int, like: Field | Size) -> Field:
        """New values that the plan lets live on the device or not."""
        return self.field(channels, like, (name, like.width) if self.plan.values == HOST else None)

    def _in_host(self, role: Any, shape: tuple[int, ...]) -> Tensor:
        memory = self._host.get(role)
        if memory is None or memory.numel() < math.prod(shape):
            memory = self._host[role] = self.make_host(shape, self.dtype).flatten()
        return memory[:math.prod(shape)].view(shape)

    def parts(self, source: Field, grows: bool = False) -> list[Rows]:
        """Strips of equal height; multiples of 8 rows hold whole latent rows at every resolution. Where an
        upsampling makes two rows of each, they are as high as those of its result, and may hold part of a row."""
        if self.plan.rows is None:
            return [(0, source.rows)]
        ratio = self.spec.spatial_ratio
        height = max(self.plan.rows, ratio) * (self.width // source.width)
        if grows:
            ratio, height = 1, height // 4
        count = math.ceil(source.rows / height)
        height = math.ceil(source.rows / count / ratio) * ratio
        return [(start, min(start + height, source.rows)) for start in range(0, source.rows, height)]


@dataclass(frozen=True)
class Size:
    """Frames, rows and columns of the values of a level."""

    frames: int
    rows: int
    width: int


@dataclass(frozen=True)
class Places:
    """Where a residual block keeps its values. out may be h or residual: rows are written after they were read."""

    x: Field
    h: Field
    residual: Field
    out: Field


@dataclass(frozen=True)
class Room:
    """The fields of a level: its input, the inside of its blocks, and a spare one for what a block adds at its end if
    that is not its input, which is so after a shortcut's convolution and where the input is overwritten (parked)."""

    x: Field
    h: Field
    spare: Field | None = None
    parked: bool = False

    def places(self, x: Field, shortcut: bool) -> Places:
        residual = self.spare if self.spare is not None and (self.parked or shortcut) else x
        return Places(x, self.h, residual, self.h if self.parked else residual)


def room_beside(run: Run, x: Field, channels: int, full_size: bool = False) -> Room:
    """The room of a level whose input is there already; its blocks have ``channels``."""
    if full_size and run.plan.values == PARKED:
        return Room(x, x, run.field(channels, x, "parked"), parked=True)
    h = run.level_field("h", channels, x)
    if x.channels == channels:
        return Room(x, h)
    # In host memory it may lie over x where its rows are shorter than those of x that it comes from.
    return Room(x, h, run.level_field("x" if channels < x.channels else "spare", channels, x))


class Arena:
    """The device memory of the decoder's last level, in which the level before it lives too.

    The last upsampling reads that level's values from the end of the memory and writes its own from the beginning;
    it never overtakes itself, because a row that it reads is at most half as long as the two that it makes of it.
    """

    def __init__(self, run: Run, before: int, channels: int, size: Size) -> None:
        self._run, self._before, self._channels, self._size = run, before, channels, size
        self._per_row = channels if run.plan.values == PARKED else max(before, 2 * channels)
        self._memory = run.empty(size.rows * self._per_row * size.frames * size.width)

    def lend(self, before: int, channels: int, size: Size) -> Room | None:
        """Room for the level before, with ``before`` channels coming in; None if it is too large."""
        count = size.rows * channels * size.frames * size.width
        if 2 * count > self._memory.numel():
            return None
        shape = size.rows, channels, size.frames, size.width
        end = self._memory.numel()
        x = Field(self._memory[end - count:].view(shape))
        h = Field(self._memory[end - 2 * count:end - count].view(shape))
        return Room(x, h) if before == channels else Room(self._run.field(before, size), h, x)

    def room(self) -> Room:
        """Room for the last level itself."""
        size, shortcut = self._size, self._before != self._channels
        values = self._memory.view(size.rows, self._per_row, size.frames, size.width)
        if self._run.plan.values == PARKED:
            h = Field(values)
            if not shortcut:
                return Room(h, h, self._run.field(self._channels, size, "parked"), parked=True)
            # Both in the same host memory, if a row of the spare one is shorter than the row of x that it comes from.
            role = "parked" if self._channels < self._before else "spare"
            x = self._run.field(self._before, size, "parked")
            return Room(x, h, self._run.field(self._channels, size, role), parked=True)
        h, spare = Field(values[:, :self._channels]), Field(values[:, self._channels:2 * self._channels])
        return Room(Field(values[:, :self._before]), h, spare) if shortcut else Room(spare, h)
