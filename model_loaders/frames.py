"""Decoded frames: in a tensor, or in a file, where a video of any length takes the memory of a few frames.

The file holds what the decoder gave, in the decoder's precision, so that it reads back as the very frames that the
tensor would have. It has no name: it is gone when it is closed, whatever ends the program, and clearing the folder
that it lies in does it no harm.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..models.cogvideox.vae_plan import decoded_frames, lead_of_loop
from ..models.specs import VAE_TEMPORAL_RATIO, SpecError, VAESpec
from .recovery import NO_ROOM

GB = 1e9
REMEDY = ("Free some space, start ComfyUI with --temp-directory on another disk, or take 'CogVideoX Decode' and "
          "'Create Video', which keep the frames in RAM.")


class Frames(Protocol):
    """Where the frames of one video go, in their order."""

    def write(self, pixels: Tensor) -> None:
        """pixels: [1, 3, T, H, W] in -1..1, as the decoder gives them."""

    def close(self) -> None:
        """They are not wanted any more."""


@dataclass(frozen=True)
class Format:
    """What frames are for ComfyUI. to_image: from -1..1 to 0..1, in place."""

    dtype: torch.dtype
    device: torch.device
    to_image: Callable[[Tensor], Tensor]

    def frames(self, pixels: Tensor) -> Tensor:
        """[..., H, W, 3] as decoded -> the same as an IMAGE; a new tensor."""
        return self.to_image(pixels.to(device=self.device, dtype=self.dtype, copy=True))


class TensorFrames:
    """All frames in memory: ``frames`` is [1, T, H, W, 3] in 0..1."""

    def __init__(self, format: Format, shape: tuple[int, ...]) -> None:
        """shape: [T, H, W, 3]."""
        self._format, self._written = format, 0
        self.frames = torch.empty((1, *shape), dtype=format.dtype, device=format.device)

    def write(self, pixels: Tensor) -> None:
        end = self._written + pixels.shape[2]
        self.frames[:, self._written:end] = self._format.frames(pixels).permute(0, 2, 3, 4, 1)  # bcthw -> bthwc
        self._written = end

    def close(self) -> None:
        pass


class FileFrames:
    """All frames in a file without a name in ``folder``. ``shape`` is [T, H, W, 3]."""

    def __init__(self, format: Format, shape: tuple[int, ...], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shape, self._format = shape, format
        self._stored: torch.dtype | None = None  # known from the first chunk
        # Unbuffered: what a full disk did not take would be tried again when the file is closed.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as this object
        self._lock = threading.Lock()  # reading moves the file's one position
        self.close = weakref.finalize(self, self._file.close)

    def write(self, pixels: Tensor) -> None:
        """Raises:
            SpecError: the disk is full; says what to do.
        """
        self._stored = self._stored or _smaller(pixels.dtype, self._format.dtype)
        frames = pixels[0].permute(1, 2, 3, 0).to("cpu", self._stored).contiguous()  # cthw -> thwc
        rest = memoryview(frames.view(torch.uint8).numpy().reshape(-1))
        try:
            while rest:
                rest = rest[self._file.write(rest):]
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise SpecError(f"The disk with ComfyUI's temporary folder is full. {REMEDY}") from error

    def read(self, i: int) -> Tensor:
        """Frame ``i`` as ComfyUI has images, but without the batch: [H, W, 3] in 0..1."""
        assert self._stored is not None, "nothing was written yet"
        frame = torch.empty(self.shape[1:], dtype=self._stored)
        raw = frame.view(torch.uint8).numpy()
        with self._lock:
            self._file.seek(i * raw.nbytes)
            rest = memoryview(raw.reshape(-1))
            while rest:
                count = self._file.readinto(rest)  # unbuffered, it may give less than is there
                if not count:
                    raise OSError(errno.EIO, f"Frame {i} of {self.shape[0]} is not in the temporary file.")
                rest = rest[count:]
        return self._format.frames(frame)


def _smaller(decoded: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    return wanted if wanted.itemsize < decoded.itemsize else decoded


@dataclass
class _Later:
    """Frames without the first ``skip``."""

    frames: Frames
    skip: int

    def write(self, pixels: Tensor) -> None:
        skipped = min(self.skip, pixels.shape[2])
        self.skip -= skipped
        if skipped < pixels.shape[2]:
            self.frames.write(pixels[:, :, skipped:])

    def close(self) -> None:
        self.frames.close()


@dataclass
class Decoding:
    """Videos to decode, ``samples`` [B, 16, T, h, w], and ``new``, which makes where the frames of one go from their
    shape. The first ``lead`` latent frames are there for the sake of the others only, and give no frames. Videos that
    are ``done`` are not made again, whatever happens to the others."""

    samples: Tensor
    spec: VAESpec
    new: Callable[[tuple[int, ...]], Frames]
    lead: int = 0
    done: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Tensor, spec: VAESpec, new: Callable[[tuple[int, ...]], Frames],
           closed_loop: bool) -> Decoding:
        """closed_loop: the first latent frame follows the last. The decoder looks back only, so the end is put in
        front of the beginning."""
        if not closed_loop:
            return cls(samples, spec, new)
        total = samples.shape[2]
        lead = lead_of_loop(total)
        return cls(samples[:, :, [i % total for i in range(-lead, total)]], spec, new, lead)

    @property
    def frames_shape(self) -> tuple[int, ...]:
        """Of one video: [T, H, W, 3]."""
        frames, rows, columns = self.samples.shape[2:]
        ratio = self.spec.spatial_ratio
        frames = decoded_frames(frames) - self._dropped
        return frames, rows * ratio, columns * ratio, self.spec.out_channels

    @property
    def _dropped(self) -> int:
        return VAE_TEMPORAL_RATIO * self.lead

    def not_done(self) -> tuple[Tensor, ...]:
        return self.samples[len(self.done):].split(1)

    @contextmanager
    def video(self) -> Iterator[Frames]:
        """Where the frames of the next video go, which is done when the block ends well."""
        video = self.new(self.frames_shape)
        try:
            yield _Later(video, self._dropped)
        except BaseException:
            video.close()
            raise
        self.done.append(video)


def check_room(folder: Path, size: int) -> None:
    """Raises SpecError unless the disk of ``folder`` has room for ``size`` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SpecError(f"The decoded frames take {size / GB:.1f} GB in {folder}: expected that much free space, found "
                        f"{free / GB:.1f} GB. {REMEDY}")


@dataclass(frozen=True)
class FrameRange:
    """Frames ``start`` to ``stop`` of a file. For who goes over them one by one, as ComfyUI's video encoder does, it
    is an IMAGE."""

    file: FileFrames
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, H, W, 3]."""
        return self.stop - self.start, *self.file.shape[1:]

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Tensor]:
        """One frame in memory at a time, with progress; stops when the user interrupts."""
        progress = comfy.utils.ProgressBar(len(self))
        for i in range(self.start, self.stop):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield self.file.read(i)
            progress.update(1)

    def image(self) -> Tensor:
        """All of them: [T, H, W, 3]."""
        first = self.file.read(self.start)
        image = first.new_empty(self.shape)
        for i, frame in enumerate(self):
            image[i] = frame
        return image
