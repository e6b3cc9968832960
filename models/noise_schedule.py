"""The noise schedule of CogVideoX as a table. Pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .specs import ScheduleSpec


def alphas_cumprod(schedule: ScheduleSpec) -> Tensor:
    """Cumulative alphas at timesteps 0..N-1: [N], float64, ending in exactly 0 with zero terminal SNR.

    Scaled-linear betas (LDM, Rombach 2022); SNR shift a / (s + (1 - s) a) (Simple Diffusion, Hoogeboom 2023);
    then rescaled to zero terminal SNR (Lin 2024, algorithm 1). The order matters: shift first.
    """
    count = schedule.num_train_timesteps
    betas = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, count, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    shift = schedule.snr_shift_scale
    alphas = alphas / (shift + (1 - shift) * alphas)
    if schedule.rescale_betas_zero_snr:
        root = alphas.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas = root**2
    return alphas
