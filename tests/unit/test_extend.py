"""Which chunks are legal, what they take over, and how they are joined on."""

from __future__ import annotations

import re

import pytest
import torch
from cogx.models.specs import PUBLISHED, SpecError
from cogx.samplers.colour import from_oklab, to_oklab
from cogx.samplers.extend import Extension, extend, extension_problem, faded
from torch import Tensor

V1, V1_5 = PUBLISHED["5B"], PUBLISHED["1.5-5B"]


def frames_of(count: int, start: float = 0.0) -> Tensor:
    """Flat frames that tell their number: frame n has the value start + n / 100."""
    return (start + torch.arange(count) / 100).reshape(-1, 1, 1, 1).expand(-1, 4, 6, 3).clone()


@pytest.mark.parametrize("length, overlap, specs, expected", [
    (49, 9, (V1, V1_5), None), (49, 1, (V1,), None), (49, 45, (V1,), None), (17, 5, (V1,), None),
    (81, 9, (V1_5,), None), (81, 73, (V1_5,), None), (17, 1, (V1_5,), None), (81, 5, (V1, V1_5), None),
    (50, 9, (V1,), "length: 50 frames: CogVideoX 1.0 needs 8N+1 (native 49); nearest: 49 or 57."),
    (49, 49, (V1,), "overlap 49: expected less than length 49; nearest: 45."),
    (49, 46, (V1,), "overlap 46: expected less than length 49; nearest: 45."),
    (49, 8, (V1,), "overlap 8: CogVideoX 1.0 needs 4N+1 frames; nearest: 5 or 9."),
    (81, 13, (V1_5,), "overlap 13: CogVideoX 1.5 needs 8N+1 frames; nearest: 9 or 17."),
    (81, 81, (V1_5,), "overlap 81: expected less than length 81; nearest: 73."),
    (1, 1, (V1,), "length 1: expected a chunk with new frames; nearest: 9."),
    (1, 1, (V1_5,), "length 1: expected a chunk with new frames; nearest: 17."),
])
def test_legal_chunks(length, overlap, specs, expected):
    assert extension_problem(length, overlap, *specs) == expected
    if len(specs) == 1 and expected:
        with pytest.raises(SpecError, match=re.escape(expected)):
            Extension(specs[0], 1, length, overlap)


def test_learned_positions():
    with pytest.raises(SpecError, match="5B-I2V has learned positions for 49 frames only; set length 49"):
        Extension(PUBLISHED["5B-I2V"], 1, 33, 9)
    assert Extension(PUBLISHED["5B-I2V"], 1, 49, 9).new_frames == 40


@pytest.mark.parametrize("overlap, latents", [(1, 1), (5, 2), (9, 3), (45, 12)])
def test_what_is_taken_over_in_latent_frames(overlap, latents):
    """A clip of its own: its first latent frame holds one frame, the others four."""
    assert Extension(V1, 1, 49, overlap).latent_overlap == latents


@pytest.mark.parametrize("frames, words", [(1, "1 frame: expected at least the overlap of 9. Set overlap to 1,"),
                                           (8, "8 frames: expected at least the overlap of 9. Set overlap to 5,")])
def test_a_short_video(frames, words):
    with pytest.raises(SpecError, match=re.escape(words)):
        extend(frames_of(frames), Extension(V1, 1, 49, 9), lambda *_: pytest.fail("sampled"), "off")


def test_seeds_differ_and_never_overflow():
    plan = Extension(V1, 3, 49, 9)
    assert [plan.seed(2**64 - 2, chunk) for chunk in range(3)] == [2**64 - 2, 2**64 - 1, 0]


def test_a_fade_leads_from_one_to_the_other():
    weights = faded(torch.zeros(4, 2, 2, 3), torch.ones(4, 2, 2, 3))[:, 0, 0, 0]
    assert torch.allclose(weights, torch.tensor([0.2, 0.4, 0.6, 0.8]))
    same = frames_of(5)
    assert torch.allclose(faded(same, same), same)


@pytest.mark.parametrize("match", ["off", "full"])
def test_chunks_are_joined_on(match):
    """Each begins with the frames that are the last at that moment, and adds the rest; the video before stays."""
    source, plan, seen = frames_of(12), Extension(V1, 3, 9, 5), []

    def make(chunk: int, last: Tensor) -> Tensor:
        seen.append(last.clone())
        return frames_of(9, float(last[0, 0, 0, 0]))

    kept = source.clone()
    video = extend(source, plan, make, match)
    assert video.shape == (12 + 3 * 4, 4, 6, 3) and torch.equal(source, kept)
    assert torch.allclose(video, frames_of(24), atol=1e-5)
    assert torch.equal(video[:7], source[:7])
    assert [len(last) for last in seen] == [5, 5, 5]
    assert all(torch.allclose(last, frames_of(24)[7 + 4 * i:12 + 4 * i], atol=1e-5) for i, last in enumerate(seen))


def test_all_of_a_chunk_takes_on_the_colours_of_the_video():
    source = torch.rand(9, 16, 24, 3, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    drifted = from_oklab(to_oklab(source) + torch.tensor([0.04, 0.01, -0.01]))
    distance = {match: (extend(source[:5], Extension(V1, 1, 9, 5), lambda *_: drifted.clone(), match)[5:]
                        - source[5:]).abs().mean() for match in ("off", "soft", "full")}
    assert distance["full"] < 0.1 * distance["off"]
    assert abs(distance["soft"] / distance["off"] - 0.5) < 0.05


def test_other_precisions_and_channels_come_back():
    video = extend(frames_of(5).half(), Extension(V1, 1, 9, 5), lambda *_: frames_of(9), "off")
    assert video.dtype == torch.float16
