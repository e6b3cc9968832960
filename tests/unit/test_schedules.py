"""Timesteps, strength, the noise table and dynamic guidance, against diffusers and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cogx.models.noise_schedule import alphas_cumprod
from cogx.models.specs import PUBLISHED, SpecError
from cogx.samplers.guidance import dynamic_guidance
from cogx.samplers.schedules import parse_timesteps, steps_after_strength, trailing_steps_of, trailing_timesteps


def test_trailing_equals_diffusers_for_every_count():
    from diffusers import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
    surplus = 0
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()
        if len(expected) > steps:  # diffusers' slip: a last timestep of -1
            assert expected[steps:] == [-1]
            surplus += 1
        assert trailing_timesteps(steps) == expected[:steps]
    assert surplus < 100


def test_trailing_by_hand():
    assert trailing_timesteps(4) == [999, 749, 499, 249]
    assert trailing_timesteps(50)[:3] == [999, 979, 959]
    assert trailing_timesteps(1) == [999]


@pytest.mark.parametrize("steps", [1, 4, 7, 10, 25, 30, 50, 333, 1000])
def test_a_trailing_grid_and_its_tail_are_recognised(steps):
    grid = trailing_timesteps(steps)
    assert trailing_steps_of(grid) == steps
    tail = grid[len(grid) // 2:]
    found = trailing_steps_of(tail)
    assert found is not None and trailing_timesteps(found)[-len(tail):] == tail


def test_other_lists_are_not_trailing():
    assert trailing_steps_of([999, 856, 665, 399]) is None
    assert trailing_steps_of([]) is None


def test_parse_timesteps():
    assert parse_timesteps("999,856, 665;399") == [999, 856, 665, 399]
    assert parse_timesteps(" ") == []
    for text in ("999,x", "1000,5", "5,9", "9,9", "-1"):
        with pytest.raises(SpecError, match="timesteps"):
            parse_timesteps(text)


@pytest.mark.parametrize("steps, strength, kept", [
    (50, 0.3, 15), (50, 0.8, 40), (50, 1.0, 50), (10, 0.0, 0), (10, 0.1, 1)])
def test_strength(steps, strength, kept):
    assert steps_after_strength(steps, strength) == kept


def test_strength_that_leaves_no_step():
    with pytest.raises(SpecError, match=r"denoise 0\.05 of 10 steps leaves no step to run: expected at least 0\.1"):
        steps_after_strength(10, 0.05)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_noise_table_equals_diffusers(name):
    from diffusers import CogVideoXDDIMScheduler

    schedule = PUBLISHED[name].schedule
    reference = CogVideoXDDIMScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule="scaled_linear",
        snr_shift_scale=schedule.snr_shift_scale, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = alphas_cumprod(schedule)
    assert torch.allclose(ours, reference.alphas_cumprod, rtol=1e-13, atol=0)
    assert ours[-1] == 0


def test_dynamic_guidance_by_hand():
    # At the first of 50 steps, t = 999: ((50 - 999) / 50)^5 is huge, as in the reference.
    base = (50 - 999) / 50
    assert dynamic_guidance(6.0, 999, 50) == 1 + 6.0 * (1 - math.cos(math.pi * base**5.0)) / 2
    assert dynamic_guidance(6.0, 50, 50) == 1.0
    assert dynamic_guidance(6.0, 0, 50) == 7.0
