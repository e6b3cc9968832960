"""The plan of windows that the node shows: as data, and as a picture. Without ComfyUI."""

from __future__ import annotations

import json

import torch
from cogx.models.specs import PUBLISHED
from cogx.samplers.plan import STEPS_SHOWN, described, spans
from cogx.samplers.plan_picture import BACKGROUND, COLOURS, GAP, GROUND, LANE, LINE, MARGIN, WIDTH, lanes_of, picture_of
from cogx.samplers.windows import FUSES, SCHEDULES, Windows
from hypothesis import given, settings
from hypothesis import strategies as st


def windows_of(variant="5B", length=49, overlap=16, schedule="static", fuse="pyramid"):
    return Windows(PUBLISHED[variant], length, overlap, schedule, fuse, "freenoise", True, "window")


def latents_of(window):
    return [latent for first, last in window["frames"] for latent in range((first + 3) // 4, last // 4 + 1)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["5B", "1.5-5B"]), st.integers(1, 120), st.integers(0, 9), st.sampled_from(SCHEDULES),
       st.sampled_from(FUSES))
def test_what_the_plan_says(variant, latents, overlap, schedule, fuse):
    """The windows of the first steps, without the padding frame; on each latent frame their weights sum to 1."""
    windows = windows_of(variant, 81, 8 * overlap, schedule, fuse)
    plan = json.loads(json.dumps(described(windows, latents)))
    padding = windows.spec.padding_frames(latents)
    hidden = 0 if schedule == "looped" else padding
    visible = latents + padding - hidden
    assert plan["frames"] == 4 * visible - 3 and len(plan["steps"]) == (1 if plan["same_at_each_step"] else STEPS_SHOWN)
    assert not plan["same_at_each_step"] or schedule != "looped" or latents + padding <= 2
    for step, shown in enumerate(plan["steps"]):
        sums = [0.0] * visible
        for window, frames in zip(shown, windows.at(latents + padding, step), strict=True):
            assert latents_of(window) == [frame - hidden for frame in frames if frame >= hidden]
            for latent, weight in zip(latents_of(window), window["weights"], strict=True):
                sums[latent] += weight
        assert all(abs(total - 1) <= 1e-3 for total in sums)


def test_pixel_frames():
    """The first latent frame holds one; a window over the end has two parts."""
    assert spans([0, 1, 2]) == [[0, 8]] and spans([3]) == [[9, 12]] and spans([5, 6, 0, 1]) == [[17, 24], [0, 4]]
    one, other = described(windows_of(), 22)["steps"][0]
    assert (one["frames"], other["frames"]) == ([[0, 48]], [[33, 84]])
    assert one["weights"][:10] == [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.8]


def test_no_bar_over_another():
    windows = [{"frames": frames} for frames in ([[0, 48]], [[33, 84]], [[69, 120]], [[105, 130], [0, 20]])]
    assert lanes_of(windows) == [0, 1, 0, 1]
    assert lanes_of([*windows[:2], {"frames": [[40, 60]]}]) == [0, 1, 2]


def colour_at(picture, x, y):
    return tuple(int(value) for value in (picture[0, int(y), int(x)] * 255).round())


def test_the_picture():
    """A bar is as wide as its frames and as high as they count, on a ground that spans the window."""
    plan = described(windows_of(fuse="flat"), 22)  # 85 frames: 0-48 and 33-84; on 33-48 both count a half
    picture = picture_of(plan)
    assert picture.shape[0] == 1 and picture.shape[2:] == (WIDTH, 3) and picture.dtype == torch.float32
    top = MARGIN + 2 * LINE

    def x(frame):
        return MARGIN + (WIDTH - 2 * MARGIN) * (frame + 0.5) / 85

    low = top + 0.75 * LANE
    assert colour_at(picture, x(20), low) == colour_at(picture, x(20), top + 2) == COLOURS[0]
    assert colour_at(picture, x(40), low) == COLOURS[0] and colour_at(picture, x(40), top + 2) == GROUND
    assert colour_at(picture, x(60), low) == BACKGROUND and colour_at(picture, x(60), low + LANE) == COLOURS[1]
    assert colour_at(picture, 2, 2) == BACKGROUND, "a margin"


def test_long_plans_are_drawn():
    """Labels that do not fit are left out; each step of a schedule that moves has its band."""
    short, moving = (picture_of(described(windows_of(schedule=schedule), 12000)) for schedule in ("static", "looped"))
    assert moving.shape[1] > 3 * short.shape[1] / 2 and picture_of(described(windows_of(), 1)).shape[1] > 100


def test_the_overview_of_coarse_is_in_the_plan_and_the_picture():
    plan, static = (described(windows_of(schedule=schedule), 49) for schedule in ("coarse", "static"))
    assert len(plan["overview"]) == 13 and plan["overview"][0] == [0, 0] and plan["overview"][-1] == [189, 192]
    assert static["overview"] == [] == described(windows_of(schedule="coarse"), 13)["overview"]
    assert plan["steps"] == static["steps"]
    assert picture_of(plan).shape[1] == picture_of(static).shape[1] + LINE + LANE + GAP
    odd = described(windows_of("1.5-5B", 81, 24, "coarse"), 41)["overview"]
    assert odd[0] == [0, 0] and odd[-1] == [153, 160]
