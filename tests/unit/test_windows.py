"""Windows over a long video, their weights and their noise: for any numbers, without ComfyUI."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from cogx.models.specs import PUBLISHED, SpecError
from cogx.samplers.windows import (
    COARSE,
    COARSE_TIMESTEP,
    FUSES,
    NOISES,
    POSITIONS,
    SCHEDULES,
    Windows,
    between,
    noise_order,
    plan,
    spread,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

V1, V1_5, LEARNED = PUBLISHED["5B"], PUBLISHED["1.5-5B"], PUBLISHED["5B-I2V"]


@st.composite
def numbers(draw):
    """Total, length and overlap in tokens: any that are legal."""
    length = draw(st.integers(1, 40))
    return draw(st.integers(1, 300)), length, draw(st.integers(0, length - 1))


def windows_of(spec=V1, length=49, overlap=16, schedule="static", fuse="pyramid", noise="freenoise", anchor=True,
               positions="window"):
    return Windows(spec, length, overlap, schedule, fuse, noise, anchor, positions)


@settings(max_examples=400, deadline=None)
@given(numbers(), st.sampled_from(SCHEDULES), st.sampled_from(FUSES), st.integers(0, 70))
def test_windows_cover_every_frame_with_weight(sizes, schedule, fuse, step):
    """So that what core divides by is never 0; that the result sums to 1 is in tests/comfy/test_context_windows.py."""
    total, length, overlap = sizes
    covered = set()
    for window in plan(total, length, overlap, schedule, step):
        assert len(window) == min(length, total) == len(set(window)), "the length the model was trained on"
        shares = weights(window, total, overlap, fuse, schedule == "looped")
        assert len(shares) == len(window) and min(shares) >= 0.01
        covered |= set(window)
    assert covered == set(range(total))


@settings(max_examples=400, deadline=None)
@given(numbers(), st.sampled_from(SCHEDULES), st.integers(0, 70))
def test_no_more_windows_than_needed(sizes, schedule, step):
    """As few as cover it with this overlap; one more where they move on, or where they go over the end."""
    total, length, overlap = sizes
    count = len(plan(total, length, overlap, schedule, step))
    if total <= length:
        assert count == 1
        return
    stride = length if schedule == "batched" else length - overlap
    needed = -(-(total - (0 if schedule in ("batched", "looped") else overlap)) // stride)
    assert count in ((needed, needed + 1) if schedule == "uniform" else (needed,))


@settings(max_examples=200, deadline=None)
@given(numbers(), st.sampled_from(["static", "uniform"]), st.integers(0, 70))
def test_neighbours_overlap(sizes, schedule, step):
    total, length, overlap = sizes
    windows = plan(total, length, overlap, schedule, step)
    assert all(len(set(a) & set(b)) >= overlap for a, b in pairwise(windows))


def test_uniform_and_looped_borders_move():
    """In eight steps in a row no border is at a frame more than twice, but those at the video's ends."""
    for schedule in ("uniform", "looped"):
        starts = Counter(window[0] for step in range(8) for window in plan(100, 13, 4, schedule, step))
        assert max(count for frame, count in starts.items() if frame not in (0, 87)) <= 2


def test_the_one_window_of_a_closed_loop_begins_at_every_frame():
    for total in (1, 2, 5, 13, 22):
        windows = [plan(total, 22, 4, "looped", step)[0] for step in range(32)]
        assert all(window == [(window[0] + i) % total for i in range(total)] for window in windows)
        assert {window[0] for window in windows} == set(range(total)) and windows[0][0] == 0
    assert plan(13, 13, 4, "uniform", 3) == [list(range(13))]


@settings(max_examples=400, deadline=None)
@given(numbers())
def test_the_overview_is_spread_over_the_video(sizes):
    """Of a window's length, evenly, from the first token to the last; every token lies between its neighbours there."""
    total, length, _ = sizes
    if total <= length or length == 1:
        return
    tokens = spread(total, length)
    gaps = [b - a for a, b in pairwise(tokens)]
    assert len(tokens) == length and (tokens[0], tokens[-1]) == (0, total - 1) and max(gaps) - min(gaps) <= 1
    places = between(tokens, total)
    assert [tokens[first] + share * (tokens[second] - tokens[first]) for first, second, share in places] == (
        pytest.approx(range(total)))
    assert all(second - first in (0, 1) and 0 <= share < 1 for first, second, share in places)


def test_an_overview_of_one_token_fills_the_video():
    assert spread(4, 1) == [0] and between([0], 4) == [(0, 0, 0.0)] * 4


@pytest.mark.parametrize("spec, length, overlap, total", [(V1, 49, 16, 49), (V1_5, 81, 24, 84)])
def test_coarse_lays_out_while_the_noise_is_high(spec, length, overlap, total):
    windows = windows_of(spec, length, overlap, COARSE)
    assert windows.lays_out(total) and not windows.lays_out(total, COARSE_TIMESTEP - 1)
    assert not windows.lays_out(windows.latent_frames, 999)
    assert not windows_of(spec, length, overlap, "static").lays_out(total, 999)
    frames, patch = windows.overview(total), spec.transformer.temporal_patch
    assert len(frames) == windows.latent_frames and frames[-patch:] == list(range(total - patch, total))
    assert all(frames[i] % patch == i % patch for i in range(len(frames)))
    for frame, (first, second, share) in enumerate(windows.around(total)):
        assert frames[first] + share * (frames[second] - frames[first]) == pytest.approx(frame)
        assert first % patch == second % patch == frame % patch
    assert windows.at(total, 3) == windows_of(spec, length, overlap, "static").at(total, 3)


def test_linear_is_a_cross_fade():
    """Where two windows share just the overlap their weights sum to 1 before they are normalised."""
    total, length, overlap = 22, 13, 4
    first, second = plan(total, length, overlap, "static")
    a, b = (dict(zip(w, weights(w, total, overlap, "linear"), strict=True)) for w in (first, second))
    assert [round(a[f], 9) for f in range(9, 13)] == [0.8, 0.6, 0.4, 0.2]
    assert all(abs(a.get(f, 0) + b.get(f, 0) - 1) < 1e-9 for f in range(total))


def test_linear_of_a_closed_loop_has_no_ends():
    """Windows that touch the video's ends fade there like all others."""
    faded = [0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2]
    for first in (0, 5, 18, 20):
        window = [(first + i) % 27 for i in range(9)]
        assert windows_of(V1, 33, 16, "looped", "linear").weights_of(window, 27) == pytest.approx(faded)
    assert windows_of(V1, 33, 16, "static", "linear").weights_of(list(range(9)), 27)[:5] == [1] * 5


@settings(max_examples=200, deadline=None)
@given(numbers(), st.integers(0, 2**64 - 1))
def test_freenoise_windows_hold_the_same_noise(sizes, seed):
    """Every static window is a shuffle of the first one: no noise twice in it, and its statistics are N(0, 1)'s."""
    total, length, overlap = sizes
    order = noise_order(total, length, overlap, "freenoise", seed)
    assert order[:length] == list(range(min(length, total)))
    for window in plan(total, length, overlap, "static"):
        assert sorted(order[frame] for frame in window) == list(range(min(length, total)))


@settings(max_examples=100, deadline=None)
@given(numbers(), st.sampled_from(SCHEDULES), st.integers(0, 20))
def test_repeated_noise_is_the_first_windows(sizes, schedule, step):
    total, length, overlap = sizes
    order = noise_order(total, length, overlap, "repeated", 0)
    assert order == [frame % length for frame in range(total)]
    assert noise_order(total, length, overlap, "independent", 0) == list(range(total))


@pytest.mark.parametrize("noise", NOISES)
def test_statistics_of_every_window(noise):
    """97 frames of 5B at 96x64: mean and variance of each window within 4.5 sampling errors; shared frames identical,
    different frames of a window uncorrelated."""
    windows = windows_of(noise=noise)
    total, values = 25, 16 * 8 * 12
    drawn = torch.randn(1, 16, total, 8, 12, generator=torch.Generator().manual_seed(7))
    shared = drawn[:, :, windows.noise_of(total, 7)]
    for window in windows.at(total, 0):
        part = shared[:, :, window].double()
        count = part.numel()
        assert abs(float(part.mean())) < 4.5 / count**0.5
        assert abs(float(part.var()) - 1) < 4.5 * (2 / count) ** 0.5
        frames = part.movedim(2, 0).flatten(1)
        correlation = torch.corrcoef(frames) - torch.eye(len(window))
        assert float(correlation.abs().max()) < 5 / values**0.5
    source = windows.noise_of(total, 7)
    for a in range(total):
        for b in range(total):
            same = torch.equal(shared[:, :, a], shared[:, :, b])
            assert same == (source[a] == source[b])
    assert (len(set(source)) == 13) == (noise != "independent")


def test_1_5_counts_padded_latents_in_whole_tokens():
    windows = windows_of(V1_5, 81, 16)
    assert (windows.latent_frames, windows.latent_overlap) == (22, 4)
    for schedule in SCHEDULES:
        for step in range(9):
            for window in windows_of(V1_5, 81, 16, schedule).at(82, step):  # 321 frames: 81 latents and one of padding
                pairs = list(zip(window[::2], window[1::2], strict=True))
                assert len(window) == 22 and all(a % 2 == 0 and b == a + 1 for a, b in pairs)


def test_the_prompt_of_a_window():
    """That of its middle, over the end too; a cross-fade as long as the overlap, between the last and the first in a
    closed loop only. And which prompts no window has for its own."""
    turns = [(turn, 8) for turn in range(8)]
    loop, static = windows_of(schedule="looped", overlap=8), windows_of(overlap=8)
    assert loop.prompts_of(turns, [(24 + i) % 26 for i in range(13)], 26) == (1, 2, 0.0)  # its middle: 4.5 of 26
    around_the_end = [(20 + i) % 26 for i in range(13)]  # 0.5 of 26
    assert loop.prompts_of(turns, around_the_end, 26) == pytest.approx((7, 0, 0.75))
    assert static.prompts_of(turns, around_the_end, 26) == (0, 1, 0.0)
    assert static.prompts_of([(0, 2), (1, 2)], list(range(6, 19)), 26) == pytest.approx((0, 1, 0.25))
    assert static.unseen([(0, 3), (1, 3), (2, 3)], 26, 1) == [1]  # middles: 6.5, 17.5 and 19.5
    assert static.unseen(turns, 26, 3) == [0, 1, 3, 4, 7] and static.unseen([(0, 2), (1, 2)], 24, 1) == []
    assert len(windows_of(schedule="uniform", overlap=8).unseen(turns, 26, 8)) < 5, "windows that move show more"


BAD = [
    (V1, {"length": 48, "overlap": 16}, "length: 48 frames: CogVideoX 1.0 needs 8N+1 (native 49); nearest: 41 or 49."),
    (V1_5, {"length": 89, "overlap": 16},
     "length: 89 frames: CogVideoX 1.5 needs 16N+1 (native 81); nearest: 81 or 97."),
    (V1, {"length": 49, "overlap": 49}, "overlap 49: expected less than length 49; nearest: 48."),
    (V1_5, {"length": 81, "overlap": 200}, "overlap 200: expected less than length 81; nearest: 80."),
    (V1, {"length": 49, "overlap": 15}, "overlap 15: CogVideoX 1.0 needs a multiple of 4 frames; nearest: 12 or 16."),
    (V1_5, {"length": 81, "overlap": 12}, "overlap 12: CogVideoX 1.5 needs a multiple of 8 frames; nearest: 8 or 16."),
    (LEARNED, {"length": 81, "overlap": 16},
     "length 81: 5B-I2V has learned positions for 49 frames only; set length 49."),
    (LEARNED, {"positions": "global"},
     "positions global: 5B-I2V has learned positions for one window of 49 frames only; set positions to window."),
]


@pytest.mark.parametrize("spec, inputs, message", BAD)
def test_bad_input(spec, inputs, message):
    with pytest.raises(SpecError) as raised:
        windows_of(spec, **inputs)
    assert str(raised.value) == message


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_legal_input(schedule, fuse, positions):
    windows = windows_of(V1, 49, 0, schedule, fuse, positions=positions)
    assert all(len(windows.weights_of(window, 100)) == 13 for window in windows.at(100, 3))
