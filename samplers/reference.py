"""One run of diffusers' own CogVideoX schedulers, stepped from outside. No ComfyUI here.

The scheduler classes are used as they are; what this adds is which ``alphas_cumprod`` and which step index they see,
because their ``step`` computes the previous timestep as ``t - 1000 // n`` and ignores the list of timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.specs import ScheduleSpec
from .schedules import trailing_steps_of

SCHEDULERS = {"cogvideox_ddim": "CogVideoXDDIMScheduler", "cogvideox_dpm": "CogVideoXDPMScheduler"}


def _scheduler_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"The sampler {name} needs the package diffusers: run "
                          "'pip install -r requirements.txt' in the CogX folder, with ComfyUI's Python.") from error
    return getattr(diffusers, SCHEDULERS[name])


class ReferenceRun:
    """The steps of one run through given timesteps.

    Args:
        name: a key of ``SCHEDULERS``.
        timesteps: falling, 0..999.
        end: the timestep at which the run stops, for the first part of a split run; None to go to the clean video.
        steps: the length of the whole trailing grid, if the caller knows it.

    On a trailing grid or a part of it this is the reference to the bit, rounding of ``1000 // n`` included; on any
    other list the table of alphas is gathered at the timesteps, and each step goes to the next one.
    """

    def __init__(self, name: str, schedule: ScheduleSpec, timesteps: list[int], end: int | None = None,
                 steps: int | None = None) -> None:
        self.stochastic = name == "cogvideox_dpm"
        cls = _scheduler_class(name)
        config = {
            "beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": schedule.beta_schedule,
            "clip_sample": False, "prediction_type": schedule.prediction_type,
            "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr, "set_alpha_to_one": schedule.set_alpha_to_one,
            "snr_shift_scale": schedule.snr_shift_scale, "timestep_spacing": schedule.timestep_spacing,
        }
        full = cls(num_train_timesteps=schedule.num_train_timesteps, **config)
        grid = trailing_steps_of(timesteps, end, steps, schedule.num_train_timesteps)
        if grid is not None:
            self.scheduler, self.indices = full, list(timesteps)
            self.scheduler.set_timesteps(grid)
        else:
            table = sorted({*timesteps, *([end] if end is not None else [])})
            self.scheduler = cls(num_train_timesteps=len(table), **config)
            self.scheduler.alphas_cumprod = full.alphas_cumprod[table]
            self.scheduler.set_timesteps(len(table))
            self.indices = [table.index(t) for t in timesteps]
        self._previous_x0: Tensor | None = None

    def noised(self, latent: Tensor, noise: Tensor) -> Tensor:
        """The latent with noise of the first timestep: sqrt(a) x0 + sqrt(1 - a) noise."""
        start = torch.tensor([self.indices[0]])
        return self.scheduler.add_noise(latent, noise, start)

    def step(self, i: int, v: Tensor, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """From step ``i`` to the next. ``v`` and ``x`` are [B, T, C, H, W], variance preserving.

        Returns the next x and the predicted x0. DPM draws its noise from ``generator`` in this layout.
        """
        index = self.indices[i]
        if not self.stochastic:
            return tuple(self.scheduler.step(v, index, x, return_dict=False))
        back = self.indices[i - 1] if i > 0 else None
        x, self._previous_x0 = self.scheduler.step(v, self._previous_x0, index, back, x, generator=generator,
                                                   return_dict=False)
        return x, self._previous_x0
