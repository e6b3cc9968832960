"""Oklab and the matching of colours."""

from __future__ import annotations

import pytest
import torch
from cogx.samplers.colour import GAIN_LIMITS, correction, from_oklab, to_oklab
from torch import Tensor

NOTHING = 0.01 / 255  # a hundredth of the smallest step of a picture file


def frames_of(seed: int, count: int = 3) -> Tensor:
    return torch.rand(count, 16, 24, 3, generator=torch.Generator().manual_seed(seed))


def matched(frames: Tensor, to: Tensor, match: str = "full") -> Tensor:
    found, frames = correction(frames, to, match), frames.clone()
    assert found is not None
    found.apply_(frames)
    return frames


# The Oklab definition in XYZ: Ottosson's table of examples, taken to sRGB, and sRGB's primaries as he gives them.
@pytest.mark.parametrize("rgb, lab", [
    ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0)), ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ((1.0, 0.0, 0.0), (0.627955, 0.224863, 0.125846)), ((0.0, 1.0, 0.0), (0.866440, -0.233888, 0.179498)),
    ((0.0, 0.0, 1.0), (0.452014, -0.032457, -0.311528)), ((0.5, 0.5, 0.5), (0.598181, 0.0, 0.0)),
])
def test_values_of_the_definition(rgb, lab):
    assert torch.allclose(to_oklab(torch.tensor(rgb).reshape(1, 1, 1, 3)).flatten(), torch.tensor(lab), atol=2e-5)


def test_there_and_back():
    frames = frames_of(0, 20)
    frames[0, 0] = 0
    frames[0, 1] = 1
    frames[0, 2] *= 0.01  # the straight part of sRGB's curve
    assert float((from_oklab(to_oklab(frames)) - frames).abs().max()) < NOTHING


def test_equal_colours_stay():
    """Whatever their order in the picture."""
    frames = frames_of(1)
    for match in ("soft", "full"):
        assert float((matched(frames, frames.flip(0, 1, 2), match) - frames).abs().max()) < NOTHING
    assert correction(frames, frames_of(2), "off") is None


@pytest.mark.parametrize("frames", [3, 19])
def test_takes_on_mean_and_variance(frames):
    """Of every channel; with 'soft' half of the way."""
    source = frames_of(3, frames) * 0.4 + 0.3
    lab = to_oklab(source)
    drifted = from_oklab(lab * torch.tensor([0.9, 1.1, 0.95]) + torch.tensor([0.05, 0.01, -0.02]))

    def statistics(pixels: Tensor) -> Tensor:
        lab = to_oklab(pixels).reshape(-1, 3)
        return torch.stack([lab.mean(0), lab.std(0)])

    wanted, before = statistics(source), statistics(drifted)
    assert float((before - wanted).abs().max()) > 0.01
    assert torch.allclose(statistics(matched(drifted, source)), wanted, atol=4e-4)  # the floor of the spread
    assert torch.allclose(statistics(matched(drifted, source, "soft")), (wanted + before) / 2, atol=4e-4)


def test_other_frames_get_the_same_change():
    """What is found on the overlap is applied to frames that show something else."""
    source = frames_of(4) * 0.4 + 0.3
    drifted = from_oklab(to_oklab(source) + torch.tensor([0.03, 0.0, 0.01]))
    other = frames_of(5) * 0.4 + 0.3
    moved = from_oklab(to_oklab(other) + torch.tensor([0.03, 0.0, 0.01]))
    found = correction(drifted, source, "full")
    assert found is not None
    found.apply_(moved)
    assert float((moved - other).abs().max()) < 1e-3


def test_flat_colours():
    """No division by nothing: a grey scene with noise in its decoded colours leaves a later colour alone."""
    grey = torch.full((2, 16, 16, 3), 0.5)
    assert float((matched(grey, grey) - grey).abs().max()) < NOTHING
    assert float((matched(grey + 0.1, grey) - grey).abs().max()) < NOTHING
    noisy = (grey + 0.02 * torch.randn(grey.shape, generator=torch.Generator().manual_seed(6))).clamp(0, 1)
    found = correction(noisy, grey, "full")
    assert found is not None and bool((found.gain >= GAIN_LIMITS[0]).all())
    assert bool(torch.isfinite(matched(noisy, grey)).all())
    reverse = correction(grey, noisy, "full")
    assert reverse is not None and bool((reverse.gain <= GAIN_LIMITS[1]).all())


def test_results_are_colours():
    """Outside 0..1 nothing comes out, and other precisions are kept."""
    dark, light = frames_of(7) * 0.2, frames_of(8) * 0.2 + 0.8
    for frames in (dark, dark.bfloat16()):
        out = matched(frames, light)
        assert out.dtype == frames.dtype and float(out.min()) >= 0 and float(out.max()) <= 1
