"""Every sampler of KSampler and ours, on every kind of schedule: finite, right shape, interruptible. In process."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import pytest
import torch
from cogx.model_loaders.load import load_model
from cogx.samplers import adapter

SCHEDULES = ["trailing", "simple", "beta", "karras"]
SHAPE = (1, 16, 3, 4, 4)
STEPS = 5


@pytest.fixture(scope="module")
def model(tiny_pipelines):
    return load_model(str(tiny_pipelines / "5B" / "transformer"))


@pytest.fixture(scope="module")
def prompts():
    positive, negative = torch.randn(2, 1, 226, 32, generator=torch.Generator().manual_seed(5))
    return [[positive, {}]], [[negative, {}]]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)


def run(model, prompts, sampler, schedule, callback=None):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    sigmas = adapter.make_sampler_sigmas(model, sampler, STEPS, schedule, 1.0)
    return comfy.sample.sample_custom(model, noise, 3.0, adapter.sampler_object(sampler), sigmas, *prompts,
                                      torch.zeros(SHAPE), seed=1, disable_pbar=True, callback=callback)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", adapter.sampler_names())
def test_finite_and_interruptible(model, prompts, sampler, schedule):
    out = run(model, prompts, sampler, schedule)
    assert out.shape == SHAPE and torch.isfinite(out).all()

    steps: list[int] = []

    def interrupt(step, x0, x, total):
        steps.append(step)
        comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, prompts, sampler, schedule, interrupt)
    assert len(steps) == 1, "it went on after the interrupt"
