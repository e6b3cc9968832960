"""A VIDEO whose frames lie in a file: no node that takes it needs them all in memory, unless it wants an IMAGE."""

from __future__ import annotations

import contextlib
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import Input, InputImpl, Types
from torch import Tensor

from .frames import FrameRange
from .vae import CogVideoXVAE


class StreamedVideo(Input.Video):
    """Frames [T, H, W, 3] that are read when they are wanted, as often as they are wanted.

    ComfyUI's own encoder writes them, one by one: the file is that of an IMAGE with Create Video and Save Video.
    """

    def __init__(self, frames: FrameRange, frame_rate: Fraction, audio: Any = None) -> None:
        self._frames, self._rate, self._audio = frames, frame_rate, audio

    def get_components(self) -> Types.VideoComponents:
        return self._components(self._frames.image())

    def _components(self, images: Any) -> Types.VideoComponents:
        return Types.VideoComponents(images=images, audio=self._audio, frame_rate=self._rate)

    def save_to(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """As ComfyUI's; its versions take different arguments. A file that could not be finished is not left there."""
        video = InputImpl.VideoFromComponents(self._components(self._frames))
        try:
            video.save_to(path, *args, **kwargs)
        except BaseException:
            if isinstance(path, (str, os.PathLike)):
                with contextlib.suppress(OSError):  # the error that is on its way counts
                    os.remove(path)
            raise

    def as_trimmed(self, start_time: float | None = 0.0, duration: float | None = 0.0,
                   strict_duration: bool = True) -> StreamedVideo | None:
        """The frames that begin in ``duration`` seconds from ``start_time``, counted from the end if that is negative;
        ``duration`` 0: to the end. None if there is no frame, or if it is strict and they are too few."""
        start, duration, count = start_time or 0.0, duration or 0.0, len(self._frames)
        if start < 0:
            start = max(0.0, self.get_duration() + start)
        first = self._frame_at(start)
        stop = self._frame_at(start + duration) if duration else count
        if first >= min(stop, count) or (strict_duration and stop > count):
            return None
        stop = min(stop, count)
        frames = FrameRange(self._frames.file, self._frames.start + first, self._frames.start + stop)
        return StreamedVideo(frames, self._rate, self._audio_between(first, stop))

    def _frame_at(self, seconds: float) -> int:
        """The first frame that does not begin before; a millionth of a frame does not count."""
        return math.ceil(round(seconds * float(self._rate), 6))

    def _audio_between(self, first: int, stop: int) -> Any:
        if not self._audio:
            return self._audio
        start, end = (round(frame / self._rate * self._audio["sample_rate"]) for frame in (first, stop))
        return {**self._audio, "waveform": self._audio["waveform"][..., start:end]}

    def get_dimensions(self) -> tuple[int, int]:
        return self._frames.shape[2], self._frames.shape[1]

    def get_duration(self) -> float:
        return float(len(self._frames) / self._rate)

    def get_frame_count(self) -> int:
        return len(self._frames)

    def get_frame_rate(self) -> Fraction:
        return self._rate


def decode_to_videos(vae: CogVideoXVAE, samples: Tensor, frame_rate: Fraction, audio: Any, *options: Any,
                     **named: Any) -> list[StreamedVideo]:
    """A VIDEO of each latent in ``samples`` [B, 16, T, h, w]. ``options``: of ``CogVideoXVAE.decode_video``.

    The decode is done here and once: with progress, and where a failure leaves the latent to try again.
    """
    folder = Path(folder_paths.get_temp_directory())
    files = vae.decode_to_files(samples, folder, *options, **named)
    return [StreamedVideo(FrameRange(file, 0, file.shape[0]), frame_rate, audio) for file in files]
