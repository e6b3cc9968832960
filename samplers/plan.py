"""The windows over a video as data: which frames each has, and how much each counts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models.specs import VAE_TEMPORAL_RATIO
from .windows import Windows

STEPS_SHOWN = 4  # of schedules that move


def described(windows: Windows, latent_frames: int) -> dict[str, Any]:
    """The plan for a video of ``latent_frames``, padding frames not counted; JSON-able.

    ``steps`` holds the windows of each step: of one, if they are the same at each, else of the first four. A window has
    its ``frames`` as pairs of the first and the last pixel frame (two where it goes over the end) and its ``weights``,
    one for each latent frame; those of all windows on a latent frame sum to 1. ``overview`` has the frames of the one
    window that 'coarse' lays the video out with while the noise is high; empty without one.
    """
    padding = windows.spec.padding_frames(latent_frames)
    total = latent_frames + padding
    hidden = 0 if windows.closed else padding  # a closed loop keeps the padding frames
    moves = len({str(windows.at(total, step)) for step in range(STEPS_SHOWN)}) > 1
    steps = [_step(windows, windows.at(total, step), total, hidden) for step in range(STEPS_SHOWN if moves else 1)]
    overview = windows.overview(total) if windows.lays_out(total) else []
    return {
        "frames": _pixel_frames(total - hidden - 1)[1] + 1, "length": windows.length, "overlap": windows.overlap,
        "schedule": windows.schedule, "fuse": windows.fuse, "noise": windows.noise, "same_at_each_step": not moves,
        "overview": spans([frame - hidden for frame in overview if frame >= hidden]), "steps": steps,
    }


def _step(windows: Windows, planned: list[list[int]], total: int, hidden: int) -> list[dict[str, Any]]:
    weights = [windows.weights_of(window, total) for window in planned]
    sums = [0.0] * total
    for window, counts in zip(planned, weights, strict=True):
        for frame, weight in zip(window, counts, strict=True):
            sums[frame] += weight
    found = []
    for window, counts in zip(planned, weights, strict=True):
        seen = [(frame - hidden, weight / sums[frame]) for frame, weight in zip(window, counts, strict=True)
                if frame >= hidden]
        found.append({"frames": spans([frame for frame, _ in seen]), "weights": [round(w, 4) for _, w in seen]})
    return found


def spans(latents: Sequence[int]) -> list[list[int]]:
    """The pixel frames of latent frames, as pairs of the first and the last of each run."""
    found: list[list[int]] = []
    for place, latent in enumerate(latents):
        first, last = _pixel_frames(latent)
        if place and latent == latents[place - 1] + 1:
            found[-1][1] = last
        else:
            found.append([first, last])
    return found


def _pixel_frames(latent: int) -> tuple[int, int]:
    """The first and the last pixel frame that a latent frame holds: the first of a video holds one."""
    last = VAE_TEMPORAL_RATIO * latent
    return max(0, last - VAE_TEMPORAL_RATIO + 1), last
