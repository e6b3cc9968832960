"""What judges long videos of the embedded model: right ones pass, and each way to be wrong fails. Made clips only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cogx.scripts.demo_model import clips
from cogx.scripts.demo_model.evaluate_long import LONG_FRAMES, judge, long_cases, of_seconds, seam, similarity

SPEED = 4.0  # pixels in a second: 32 in the whole video


def track_of(motion: str, frames: int = LONG_FRAMES) -> np.ndarray:
    """Centres [F, 2] of a motion that goes on, around the middle of the picture."""
    time = np.arange(frames) / clips.FPS
    if motion == "bounce":
        path = np.stack([0 * time, 13 - 26 * np.abs(np.sin(np.pi * time / 4))], 1)
    else:
        path = np.outer(time - time[-1] / 2, clips.DIRECTIONS.get(motion, (0, 0))) * SPEED
    return path + np.array([clips.WIDTH / 2, clips.HEIGHT / 2])


def video_of(track: np.ndarray, colours: np.ndarray | None = None, shape: str = "circle") -> np.ndarray:
    """A shape, red or of [F, 3] colours, on a track over grey: uint8 [F, H, W, 3]."""
    colours = np.broadcast_to(clips.COLOURS["red"], (len(track), 3)) if colours is None else colours
    covered = np.stack([clips.coverage(shape, (x, y), 11) for x, y in track])[..., None]
    return np.rint(115 + covered * (colours[:, None, None] - 115)).astype(np.uint8)


def scene(motion: str, colour: str = "red") -> clips.Scene:
    return clips.Scene("circle", colour, motion, "grey", "slow")


def test_every_held_out_combination_is_a_case():
    triples = {(case.scene.shape, case.scene.colour, case.scene.motion) for case in long_cases()}
    assert triples == clips.HELD_OUT and len(long_cases()) == 24


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_a_motion_that_goes_on_is_good(motion):
    video = video_of(track_of(motion))
    judged = judge(video, scene(motion))
    assert judged.good and judged.hue_error < 1
    if motion in clips.DIRECTIONS:
        assert seam([video], [17, 33, 49], [5, 9, 13, 21, 25]) < 1.3
    for other in clips.MOTIONS:
        assert judge(video, scene(other)).good == (other == motion), other


@pytest.mark.parametrize("motion", [*clips.DIRECTIONS, "bounce"])
def test_clips_one_after_another_fail(motion):
    """Four clips that each begin anew: the motion goes back, and their borders show."""
    rng = np.random.default_rng(1)
    parts = [clips.render(replace(scene(motion), speed="normal"), rng)[0] for _ in range(4)]
    video = np.concatenate(parts)[:LONG_FRAMES]
    assert not judge(video, scene(motion)).good
    assert seam([video], [17, 34, 51], [5, 9, 13, 22, 26, 30, 39, 43, 47]) > 1.3


def test_the_same_clip_again_and_again_fails():
    once = track_of("right", 17)
    assert not judge(video_of(np.concatenate([once] * 4)[:LONG_FRAMES]), scene("right")).motion


def test_a_drift_of_colour_fails():
    """From red to purple; brighter or darker is no other colour."""
    share = np.linspace(0, 1, LONG_FRAMES)[:, None]
    red, purple = (np.array(clips.COLOURS[name], float) for name in ("red", "purple"))
    judged = judge(video_of(track_of("right"), (1 - share) * red + share * purple), scene("right"))
    assert not judged.colour and judged.motion
    assert judge(video_of(track_of("right"), (1 - 0.2 * share) * red), scene("right")).colour


def test_a_jump_a_stop_and_a_turn_fail():
    for broken in ("jump", "stop", "turn"):
        track = track_of("right")
        if broken == "jump":
            track[30:] += (0, 9)
        elif broken == "stop":
            track[20:33] = track[20]
        else:
            track[40:] = 2 * track[40] - track[40:]
        assert not judge(video_of(track), scene("right")).motion, broken


def test_what_begins_again_in_each_window_or_halts_fails():
    """What windows without a common plan make of a motion."""
    halted = track_of("right")
    halted[8:57] = halted[32]
    assert not judge(video_of(halted), scene("right")).motion
    bounced = track_of("bounce")
    bounced[24:41] = bounced[24]
    assert not judge(video_of(bounced), scene("bounce")).motion


def test_a_picture_without_the_object_fails():
    video = video_of(track_of("still"))
    video[40] = 115
    assert not judge(video, scene("still")).colour


def test_the_object_is_known_wherever_it_is():
    image = video_of(np.array([[20.0, 20.0]]))[0]
    same = similarity(video_of(track_of("down left")), image)
    assert same.min() > 0.9 and same.mean() > 0.95
    assert of_seconds(same).shape == (8,)
    green = np.broadcast_to(np.array(clips.COLOURS["green"], float), (LONG_FRAMES, 3))
    assert similarity(video_of(track_of("still"), green), image).max() == 0
    for shape in ("square", "triangle"):
        assert similarity(video_of(track_of("still"), shape=shape), image).max() < 0.9 * same.mean()
    assert similarity(np.full_like(image, 115)[None], image) == [0.0]
