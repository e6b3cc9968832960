"""Which timesteps a run visits: the reference's trailing grid, explicit lists, and strength. Pure."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from ..models.specs import TRAIN_TIMESTEPS, SpecError


def trailing_timesteps(steps: int, train_timesteps: int = TRAIN_TIMESTEPS) -> list[int]:
    """The reference's grid (Lin 2024, table 2, 'trailing'), largest first: 999, 979, ... for 50 steps.

    numpy's arithmetic is part of the reference: at 48 steps it decides which way x.5 rounds. At some counts (61, 103)
    its arange runs over and diffusers visits a timestep of -1; that one is dropped.
    """
    grid = np.round(np.arange(train_timesteps, 0, -train_timesteps / steps)).astype(int) - 1
    return grid[:steps].tolist()


def trailing_steps_of(timesteps: list[int], end: int | None = None, likely: int | None = None,
                      train_timesteps: int = TRAIN_TIMESTEPS) -> int | None:
    """The n of whose trailing grid ``timesteps`` is the tail, or the part that goes on to ``end``; None if none.

    A short tail fits several grids: ``likely`` is tried first, then the shortest.
    """
    wanted = timesteps if end is None else [*timesteps, end]
    for steps in (*([likely] if likely else []), *range(max(len(wanted), 1), train_timesteps + 1)):
        grid = trailing_timesteps(steps, train_timesteps)
        if wanted and wanted[0] in grid:
            part = grid[grid.index(wanted[0]):]
            if part == wanted if end is None else part[:len(wanted)] == wanted:
                return steps
    return None


def parse_timesteps(text: str, train_timesteps: int = TRAIN_TIMESTEPS) -> list[int]:
    """Explicit timesteps of a distilled model, such as "999,856,665,399".

    Raises:
        SpecError: not whole numbers, out of range, or not falling.
    """
    if not isinstance(text, str):
        raise SpecError(f"timesteps {text!r}: expected text such as 999,856,665,399, or nothing.")
    try:
        values = [int(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise SpecError(f"timesteps {text!r}: expected whole numbers separated by commas, such as "
                        "999,856,665,399.") from None
    if any(not 0 <= t < train_timesteps for t in values):
        raise SpecError(f"timesteps {text!r}: expected numbers from 0 to {train_timesteps - 1}.")
    if any(later >= earlier for earlier, later in pairwise(values)):
        raise SpecError(f"timesteps {text!r}: expected falling numbers, such as 999,856,665,399; sort them.")
    return values


def steps_after_strength(steps: int, denoise: float) -> int:
    """Steps that remain at a strength: diffusers' ``get_timesteps`` of video to video, min(int(steps * s), steps).

    Raises:
        SpecError: none remain although ``denoise`` is above 0.
    """
    kept = min(int(steps * denoise), steps)
    if denoise > 0 and not kept:
        raise SpecError(f"denoise {denoise} of {steps} steps leaves no step to run: expected at least "
                        f"{math.ceil(100 / steps) / 100}, or more steps.")
    return kept
