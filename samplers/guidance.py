"""Guidance scales that change over the run. Pure Python."""

from __future__ import annotations

import math


def dynamic_guidance(scale: float, timestep: float, steps: int) -> float:
    """The scale at a timestep: 1 + g (1 - cos(pi ((n - t) / n)^5)) / 2.

    ``timestep`` is 0..999 while n is the number of steps, so the term swings many times. It looks like a slip, and is
    what both references compute (the authors' ``DynamicCFG`` and diffusers' ``use_dynamic_cfg``).
    """
    return 1 + scale * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2
