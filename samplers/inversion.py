"""DDIM inversion: from a video to the noise that DDIM makes it from (DDIM, Song 2021, sec. 4.3). No ComfyUI here.

At a cumulative alpha a, with cos(u) = sqrt(a), a noisy video is x = cos(u) x0 + sin(u) noise and v = dx/du. A DDIM step
with v rotates: x' = cos(d) x + sin(d) v, d = u' - u. In this form nothing is divided by alpha, which is 0 at the top.
Videos are [B, C, T, H, W] in the model's scale, variance preserving, the padding frames of 1.5 included.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.noise_schedule import alphas_cumprod
from ..models.specs import ScheduleSpec, SpecError
from .schedules import trailing_timesteps
from .windows import COARSE


def angles_of(schedule: ScheduleSpec) -> list[float]:
    """The angle u of every timestep; pi / 2 at the last one with zero terminal SNR."""
    return [math.atan2(math.sqrt(1 - a), math.sqrt(a)) for a in alphas_cumprod(schedule).tolist()]


class InverseRun:
    """The steps of one inversion, from the clean video up the trailing grid of ``steps``.

    Each step ends at a timestep of the grid and begins where the reference's DDIM step from there ends, rounding of
    ``1000 // n`` included. The network is asked at the timestep where the step ends, as by diffusers'
    ``DDIMInverseScheduler`` and the CogVideo repository's ``inference/ddim_inversion.py``.
    """

    def __init__(self, schedule: ScheduleSpec, steps: int) -> None:
        self.timesteps = trailing_timesteps(steps, schedule.num_train_timesteps)[::-1]
        self.angles = angles_of(schedule)
        self._stride = schedule.num_train_timesteps // steps
        self._clean = 0.0 if schedule.set_alpha_to_one else self.angles[0]

    def _from(self, i: int) -> float:
        before = self.timesteps[i] - self._stride
        return self.angles[before] if before >= 0 else self._clean

    def step(self, i: int, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the video before timestep ``i`` of the grid to the one there. Returns it and the predicted x0."""
        start, end = self._from(i), self.angles[self.timesteps[i]]
        turn = end - start
        return math.cos(turn) * x + math.sin(turn) * v, math.cos(start) * x - math.sin(start) * v

    def trajectory(self, videos: list[Tensor], padding: int) -> Trajectory:
        """``videos``: the clean one, then the one after each step."""
        return Trajectory(tuple(self.timesteps), tuple(self.angles), self._from(0), tuple(videos), padding)


@dataclass(frozen=True)
class Trajectory:
    """Where an inverted video passed on its way to noise.

    ``timesteps`` rise and belong to ``videos[1:]``; ``videos[0]`` is clean. ``angles`` are those of all timesteps,
    ``start`` that of the clean video. The first ``padding`` frames are those that 1.5 needs and nobody sees.
    """

    timesteps: tuple[int, ...]
    angles: tuple[float, ...]
    start: float
    videos: tuple[Tensor, ...]
    padding: int

    @property
    def noise(self) -> Tensor:
        return self.videos[-1]

    @property
    def visible_shape(self) -> tuple[int, ...]:
        """[B, C, T, H, W] without the padding frames: the shape of the LATENT."""
        batch, channels, frames, *size = self.noise.shape
        return batch, channels, frames - self.padding, *size

    def at(self, timestep: int) -> Tensor:
        """The video at any timestep: between two of the grid, on the rotation that joins them."""
        above = bisect_left(self.timesteps, timestep)
        if self.timesteps[above] == timestep:
            return self.videos[above + 1]
        low = self.angles[self.timesteps[above - 1]] if above else self.start
        high, here = self.angles[self.timesteps[above]], self.angles[timestep]
        part = math.sin(here - low), math.sin(high - here)
        return (part[1] * self.videos[above] + part[0] * self.videos[above + 1]) / math.sin(high - low)

    def noise_at(self, timestep: int) -> Tensor:
        """The noise with which the clean video, noised to ``timestep`` as samplers do, is the video ``at`` it."""
        here = self.angles[timestep]
        return (self.at(timestep) - math.cos(here) * self.videos[0]) / math.sin(here)


class InvertedNoise:
    """A NOISE: what SamplerCustomAdvanced begins with. Carries the noise of 1.5's padding frames in front."""

    seed = 0

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """Raises SpecError if the latent to sample is not of the inverted video's shape."""
        check_same_shape(tuple(input_latent["samples"].shape), self.trajectory.visible_shape)
        return self.trajectory.noise.clone()


def check_same_shape(got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse to sample another shape than that of the inverted video. Both are [B, C, T, H, W].

    Raises:
        SpecError: they differ.
    """
    if got != expected:
        raise SpecError(
            f"The inverted video has the shape {list(expected)} [batch, channels, frames, height/8, width/8], the "
            f"latent to sample {list(got)}. Expected the same: connect the LATENT that 'CogVideoX Inversion' takes to "
            "the sampler too, or an empty latent of its size.")


def attend_to_reference(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any,
                        **kwargs: Any) -> Tensor:
    """Attention of a batch whose second half is the reference of the first; q, k and v are [2N, tokens, D].

    The first half attends to its own keys and values and to those of its reference, the second to its own
    (the CogVideo repository's ``inference/ddim_inversion.py``).
    """
    q_video, q_reference = q.chunk(2)
    k_reference, v_reference = k.chunk(2)[1], v.chunk(2)[1]
    # Tokens of both halves in one row: the first half's own keys, then its reference's. Not named: they are as large as
    # k and v, and gone before the second call.
    video = attention(q_video, *(torch.cat(t.chunk(2), dim=1) for t in (k, v)), *args, **kwargs)
    return torch.cat([video, attention(q_reference, k_reference, v_reference, *args, **kwargs)])


def problem_of_windows(handler: Any) -> str | None:
    """Why a context handler does not sample from inverted noise what was inverted; None if it does, or is None."""
    if getattr(handler, "freenoise", False):
        return ("freenoise: expected it off, as the inverted noise belongs to its own frames; got it on, which "
                "shuffles them. Turn freenoise off in the context windows node ('CogVideoX Context Windows': noise "
                "independent).")
    if getattr(getattr(handler, "windows", None), "schedule", None) == COARSE:
        return ("schedule coarse: expected static, as the inverted noise holds a motion; got coarse, which lays out "
                "another. Set schedule to static in 'CogVideoX Context Windows'.")
    return None
