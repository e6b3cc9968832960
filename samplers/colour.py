"""Colours of one video matched to another's, by mean and variance in a perceptual space.

The space is Oklab (Ottosson 2020, "A perceptual color space for image processing"); matching mean and standard
deviation of each channel is Reinhard 2001, "Color transfer between images". Pure torch. Frames are [N, H, W, 3], sRGB
in 0..1; Oklab is [N, H, W, 3] of lightness 0..1, green-red and blue-yellow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OFF, SOFT, FULL = "off", "soft", "full"
MATCHES = (OFF, SOFT, FULL)
_STRENGTHS = {OFF: 0.0, SOFT: 0.5, FULL: 1.0}

# What a model and a VAE change is small. Where a channel is all but flat (a grey scene has no colour), the ratio of two
# small spreads is noise, and must not take the colour out of what comes into the picture later.
SPREAD_FLOOR = 1e-3
GAIN_LIMITS = (0.8, 1.25)
FRAMES_AT_ONCE = 8  # a video is not held twice

_LMS = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005))
_LAB = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660))


def _matrix(rows: tuple[tuple[float, ...], ...], like: Tensor, inverse: bool = False) -> Tensor:
    matrix = torch.tensor(rows, dtype=torch.float64)
    return (torch.linalg.inv(matrix) if inverse else matrix).T.to(like)


def to_oklab(frames: Tensor) -> Tensor:
    """sRGB -> Oklab, fp32."""
    rgb = frames.float().clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return (linear @ _matrix(_LMS, linear)).clamp_min(0) ** (1 / 3) @ _matrix(_LAB, linear)


def from_oklab(lab: Tensor) -> Tensor:
    """Oklab -> sRGB in 0..1; what lies outside is cut off."""
    linear = ((lab @ _matrix(_LAB, lab, inverse=True)) ** 3 @ _matrix(_LMS, lab, inverse=True)).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


@dataclass(frozen=True)
class Correction:
    """What takes the colours of a video to those of another: lab * gain + shift, each [3]."""

    gain: Tensor
    shift: Tensor

    def apply_(self, frames: Tensor) -> None:
        """Change frames in place."""
        for part in frames.split(FRAMES_AT_ONCE):
            part.copy_(from_oklab(to_oklab(part) * self.gain + self.shift))


def _statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each Oklab channel over all pixels, [3] in fp64."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for part in frames.split(FRAMES_AT_ONCE):
        lab = to_oklab(part).double().reshape(-1, 3)
        total, squares, count = total + lab.sum(0).cpu(), squares + lab.square().sum(0).cpu(), count + len(lab)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def correction(of: Tensor, to: Tensor, match: str) -> Correction | None:
    """What gives ``of`` the mean and variance of ``to``, which show the same; half of it for 'soft', None for 'off'."""
    if match == OFF:
        return None
    (mean, spread), (target, target_spread) = _statistics(of), _statistics(to)
    gain = ((target_spread + SPREAD_FLOOR) / (spread + SPREAD_FLOOR)).clamp(*GAIN_LIMITS)
    strength = _STRENGTHS[match]
    partial_gain = 1 + strength * (gain - 1)
    shift = mean + strength * (target - mean) - partial_gain * mean
    return Correction(partial_gain.to(of.device, torch.float32), shift.to(of.device, torch.float32))
