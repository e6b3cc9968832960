"""The mathematics of DDIM inversion, in float64 against formulas in alpha space."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cogx.models.noise_schedule import alphas_cumprod
from cogx.models.specs import ScheduleSpec, SpecError
from cogx.samplers.inversion import InverseRun, InvertedNoise, Trajectory, attend_to_reference
from cogx.samplers.schedules import trailing_timesteps

SHAPE = (1, 2, 3, 4, 4)
SCHEDULES = [ScheduleSpec(), ScheduleSpec(snr_shift_scale=3.0), ScheduleSpec(rescale_betas_zero_snr=False),
             ScheduleSpec(set_alpha_to_one=False)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def before(schedule: ScheduleSpec, timestep: int, steps: int) -> float:
    """The cumulative alpha that the reference's DDIM step from ``timestep`` ends at."""
    target = timestep - 1000 // steps
    alphas = alphas_cumprod(schedule)
    return float(alphas[target]) if target >= 0 else (1.0 if schedule.set_alpha_to_one else float(alphas[0]))


@pytest.mark.parametrize("steps", [1, 7, 30, 48, 50, 61, 1000])
def test_timesteps_are_the_trailing_grid_upwards(steps):
    assert InverseRun(ScheduleSpec(), steps).timesteps == sorted(trailing_timesteps(steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 10, 30, 48, 50])
def test_steps_are_ddim_backwards(schedule, steps):
    """DDIM (Song 2021, eq. 12) from each timestep and back: the noise and the video that v stands for do not change."""
    run, alphas = InverseRun(schedule, steps), alphas_cumprod(schedule)
    for i, timestep in enumerate(run.timesteps):
        x0, noise = draw(*SHAPE, seed=i), draw(*SHAPE, seed=1000 + i)
        b, a = float(alphas[timestep]), before(schedule, timestep, steps)
        x, v = (math.sqrt(a) * p + math.sqrt(1 - a) * q for p, q in ((x0, noise), (noise, -x0)))
        after, predicted = run.step(i, v, x)
        assert torch.allclose(after, math.sqrt(b) * x0 + math.sqrt(1 - b) * noise, atol=1e-12)
        assert torch.allclose(predicted, x0, atol=1e-12)


def line(schedule: ScheduleSpec, steps: int, padding: int = 0) -> tuple[Trajectory, torch.Tensor, torch.Tensor]:
    """The trajectory of a model that knows the video and its noise: every point is a mixture of the two."""
    run, alphas = InverseRun(schedule, steps), alphas_cumprod(schedule)
    x0, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    videos = [x0, *(alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * noise for t in run.timesteps)]
    return run.trajectory(videos, padding), x0, noise


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("timestep", [0, 1, 19, 333, 500, 978, 979, 980, 998, 999])
def test_trajectory_between_its_timesteps(steps, timestep):
    trajectory, x0, noise = line(ScheduleSpec(), steps)
    a = alphas_cumprod(ScheduleSpec())[timestep]
    assert torch.allclose(trajectory.at(timestep), a.sqrt() * x0 + (1 - a).sqrt() * noise, atol=1e-9)
    assert torch.allclose(trajectory.noise_at(timestep), noise, atol=1e-9)


def test_trajectory_at_its_timesteps_is_what_was_seen():
    trajectory, _, _ = line(ScheduleSpec(), 10)
    assert all(trajectory.at(t) is video for t, video in
               zip(trajectory.timesteps, trajectory.videos[1:], strict=True))
    assert trajectory.noise is trajectory.videos[-1] and trajectory.timesteps[-1] == 999


def test_full_noise_is_where_alpha_is_exactly_zero():
    """No trace of the video is left in the last step's noise, and nothing divides by zero."""
    schedule = ScheduleSpec()
    assert float(alphas_cumprod(schedule)[-1]) == 0.0
    trajectory, _, noise = line(schedule, 1)
    assert torch.equal(trajectory.noise, noise) and torch.allclose(trajectory.noise_at(999), noise, atol=1e-15)


def test_noise_knows_its_shape_and_brings_its_padding():
    trajectory, _, _ = line(ScheduleSpec(), 2, padding=1)
    noise = InvertedNoise(trajectory)
    made = noise.generate_noise({"samples": torch.zeros(1, 2, 2, 4, 4)})
    assert torch.equal(made, trajectory.noise) and made is not trajectory.noise
    with pytest.raises(SpecError, match=r"shape \[1, 2, 2, 4, 4\] .*the latent to sample \[1, 2, 3, 4, 4\]. Expected"):
        noise.generate_noise({"samples": torch.zeros(1, 2, 3, 4, 4)})


def test_attention_beside_a_reference():
    """Each query of the first half over its own and its reference's tokens; the second half as if alone."""
    q, k, v = (draw(4, 5, 6, seed=s) for s in range(3))

    def attention(q, k, v, heads, scale=1.0):
        assert heads == 1
        return torch.softmax(scale * q @ k.transpose(1, 2), dim=-1) @ v

    out = attend_to_reference(attention, q, k, v, 1, scale=0.5)
    for i in (0, 1):
        scores = torch.exp(0.5 * q[i] @ torch.cat([k[i], k[i + 2]]).T)
        expected = (scores / scores.sum(-1, keepdim=True)) @ torch.cat([v[i], v[i + 2]])
        assert torch.allclose(out[i], expected)
    assert torch.allclose(out[2:], attention(q[2:], k[2:], v[2:], 1, scale=0.5))


def test_a_schedule_of_another_length():
    run = InverseRun(replace(ScheduleSpec(), num_train_timesteps=100), 10)
    assert run.timesteps == list(range(9, 100, 10))
