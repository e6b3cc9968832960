"""The judge of the demo model: right about true clips, at chance about wrong ones; and what is held out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from cogx.scripts.demo_model import clips, evaluate
from cogx.scripts.demo_model.clips import ATTRIBUTES, Scene


def true_clip(case: evaluate.Case) -> np.ndarray:
    return clips.render(case.scene, np.random.default_rng(case.seed))[0]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [clips.training_scene(rng) for _ in range(3000)]


def test_true_clips_are_all_right_and_shuffled_ones_near_chance():
    cases = evaluate.held_out_cases() + evaluate.training_cases()
    right, control = evaluate.evaluate(true_clip, cases), evaluate.evaluate(true_clip, cases, shuffled=True)
    assert (right.shape, right.colour, right.motion, right.count) == (1.0, 1.0, 1.0, 96)
    # Chance is a third, a sixth, an eighth; three standard deviations of 96 draws.
    for share, chance in ((control.shape, 1 / 3), (control.colour, 1 / 6), (control.motion, 1 / 8)):
        assert abs(share - chance) < 3 * (chance * (1 - chance) / 96) ** 0.5


def test_the_judge_bears_what_a_small_model_gets_wrong():
    """Noise, and a shape without sharp edges."""
    rng = np.random.default_rng(1)

    def blurred(case: evaluate.Case) -> np.ndarray:
        frames = true_clip(case).astype(float)
        soft = (frames + np.roll(frames, 1, 1) + np.roll(frames, 1, 2) + np.roll(frames, (1, 1), (1, 2))) / 4
        return np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)

    scores = evaluate.evaluate(blurred, evaluate.held_out_cases())
    assert min(scores.shape, scores.colour, scores.motion) > 0.95


@pytest.mark.parametrize("frames", [np.zeros((17, 64, 96, 3), np.uint8), np.full((17, 64, 96, 3), 200, np.uint8)])
def test_an_empty_video_shows_nothing(frames):
    assert evaluate.look(frames) == evaluate.Seen()


def test_noise_is_not_mistaken_for_a_moving_shape():
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3)).astype(np.uint8)
    assert evaluate.look(noise).motion in (None, "still")


def test_a_shape_that_stops_being_there_is_not_right():
    frames = clips.render(Scene("circle", "red", "left", "dark"), np.random.default_rng(0))[0]
    frames[8:] = 0
    assert evaluate.look(frames) == evaluate.Seen()


OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up", "up right": "down left",
             "down left": "up right", "still": "still", "bounce": "bounce"}


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_a_reversed_clip_moves_the_other_way(motion):
    frames = clips.render(Scene("circle", "red", motion, "dark"), np.random.default_rng(0))[0]
    assert evaluate.look(frames).motion == motion
    assert evaluate.look(frames[::-1]).motion == OPPOSITES[motion]


def test_an_unknown_direction_is_no_motion():
    frames = clips.render(Scene("circle", "red", "up right", "dark"), np.random.default_rng(0))[0]
    assert evaluate.look(frames[:, :, ::-1]).motion is None  # up left


def test_no_training_clip_shows_a_held_out_combination(scenes):
    assert len(clips.HELD_OUT) == 24 and len(set(clips.held_out_scenes())) == 48
    assert not {(scene.shape, scene.colour, scene.motion) for scene in scenes} & clips.HELD_OUT
    held_out = {(scene.shape, scene.colour, scene.motion) for scene in clips.held_out_scenes()}
    assert held_out == clips.HELD_OUT
    assert {scene.background for scene in clips.held_out_scenes()} == set(clips.BACKGROUNDS)


def test_every_pair_of_attributes_is_trained(scenes):
    for first, second in combinations(ATTRIBUTES, 2):
        seen = {(getattr(scene, first), getattr(scene, second)) for scene in scenes}
        assert len(seen) == len(ATTRIBUTES[first]) * len(ATTRIBUTES[second])


def test_the_shape_stays_in_the_frame_and_keeps_its_size(scenes):
    rng = np.random.default_rng(2)
    for scene in scenes[:60]:
        area = clips.render(scene, rng)[1].sum((1, 2))
        assert np.ptp(area) < 0.02 * area.mean()  # a part outside the frame would be missing
        assert 300 < area.mean() < 540


def test_a_first_frame_does_not_give_the_motion_away():
    """The same places, whatever the motion: the frames of one seed differ in nothing."""
    frames = [clips.first_frame(Scene("square", "blue", motion, "grey", "slow"), np.random.default_rng(3))
              for motion in clips.MOTIONS]
    assert all(np.array_equal(frames[0], frame) for frame in frames)


def test_a_sentence_says_what_the_scene_says_and_no_more():
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene = clips.training_scene(rng)
        sentence = clips.describe(scene, rng).lower()
        assert f"{scene.colour} {scene.shape}" in sentence
        opened = clips.partial(scene, rng)
        sentence = clips.describe(opened, rng).lower()
        assert (opened.colour is None) == (scene.colour not in sentence.replace("colour", ""))
        assert (opened.shape is None) == (f"{scene.shape}" not in sentence)
        assert (opened.background is None) == ("ground" not in sentence)


def test_everything_is_drawn_from_the_seed():
    def made() -> tuple[np.ndarray, str]:
        rng = np.random.default_rng(5)
        scene = clips.training_scene(rng)
        return clips.render(scene, rng)[0], clips.describe(scene, rng)

    (first, one), (second, other) = made(), made()
    assert np.array_equal(first, second) and one == other
