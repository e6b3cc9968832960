"""Whether a video longer than the demo model was trained on holds together: its colour, its motion, its seams.

Nothing here knows how the video was made; ``seam`` is told where one window or clip meets another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import clips, evaluate
from .clips import FPS, Scene
from .evaluate import Case

LONG_FRAMES = 65  # 17 latent frames: nearest to four times the 17 frames of training that is 4N+1 and 8N+1
# Neighbouring colours are 44 degrees of hue or more apart; training varies one by 4 degrees.
HUE_DEGREES = 15.0
# Per second. What stays still wobbles by 0.7 pixels in samples; a slow motion at a quarter of its pace makes 1.1.
STEP_PIXELS = 1.0
# Over the whole video: farther than a slow motion gets in the 17 frames of training, so a motion that begins again and
# again does not do.
WHOLE_PIXELS = 14.0
# Between two frames. The fastest motion of training makes 1.9, the fastest bounce 11.
JUMP_PIXELS, BOUNCE_JUMP_PIXELS = 4.0, 12.0
SEAM_RATIO = 1.3
FAINT_CHROMA = 30  # what the VAE makes of a grey background has less


@dataclass(frozen=True)
class Judged:
    """What is right about a long video."""

    colour: bool
    motion: bool
    hue_error: float  # degrees, the mean of the worst second; 180 if nothing is to be seen
    seconds: tuple[float, ...]  # pixels that the motion went on by, in each second
    jump: float  # pixels, the farthest between two frames

    @property
    def good(self) -> bool:
        return self.colour and self.motion


def long_cases() -> list[Case]:
    """The 24 held-out combinations, each over one background, all motions among them.

    They ask for a fast motion: 26 to 30 pixels, the most of training, are what the picture has room for in every
    direction and what is left of them in 65 frames is still a motion. How fast it is there is not judged.
    """
    return evaluate.cases_of([replace(scene, speed="fast") for scene in clips.held_out_scenes()[::2]], seed=7)


def long_image_cases() -> list[Case]:
    """The same with the first frame of a clip, where the object has room for its fast motion."""
    rng = np.random.default_rng(11)
    return [replace(case, image=clips.render(case.scene, rng)[0][0]) for case in long_cases()]


def hue(rgb: np.ndarray) -> float:
    """The angle of a colour around the axis of grey, in degrees."""
    red, green, blue = map(float, rgb)
    return math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))


def hue_errors(frames: np.ndarray, found: np.ndarray, colour: str) -> np.ndarray:
    """Of the mean coloured pixel of each frame against a named colour: [F], degrees."""
    wanted = hue(np.array(clips.COLOURS[colour]))
    errors = [hue(frame[mask].mean(0)) - wanted for frame, mask in zip(frames, found, strict=True)]
    return np.abs((np.array(errors) + 180) % 360 - 180)


def judge(frames: np.ndarray, scene: Scene) -> Judged:
    """A long video (uint8 [F, H, W, 3]) of a scene. The object must be seen in every frame."""
    assert scene.colour and scene.motion
    found = evaluate.masks(frames)
    if (found.sum((1, 2)) < evaluate.MIN_AREA).any():
        return Judged(False, False, 180.0, (), math.inf)
    errors = hue_errors(frames, found, scene.colour)
    worst = max(float(errors[start:start + FPS].mean()) for start in range(0, len(errors) - 1, FPS))
    track = np.array([evaluate.centroid(mask) for mask in found])
    seconds, right = went_on(track, scene.motion)
    jump = float(np.hypot(*np.diff(track, axis=0).T).max())
    limit = BOUNCE_JUMP_PIXELS if scene.motion == "bounce" else JUMP_PIXELS
    return Judged(worst <= HUE_DEGREES, right and jump <= limit, worst, seconds, jump)


def went_on(track: np.ndarray, motion: str) -> tuple[tuple[float, ...], bool]:
    """How far a motion went in each second of a track [F, 2] of centroids, and whether it goes on through all of them.

    As a whole it must be that motion by the rule for short videos. Besides, a direction: in each second within 45
    degrees of it, and in all farther than a restart lets it get. "bounce": up or down all the time: in any two seconds
    farther than what stays still, in any four as far as a bounce.
    """
    right = evaluate.motion_of(track) == motion
    if motion == "still":
        return tuple(np.hypot(*(track[FPS::FPS] - track[:-FPS:FPS]).T)), right
    if motion == "bounce":
        return tuple(_spans(track, 2)), right and bool(
            _spans(track, 2).min() > evaluate.STILL_PIXELS and _spans(track, 4).min() > evaluate.BOUNCE_PIXELS)
    x, y = clips.DIRECTIONS[motion]
    steps = track[FPS::FPS] - track[:-FPS:FPS]
    along, across = steps @ (x, y), np.abs(steps @ (-y, x))
    return tuple(along), right and bool(
        (along >= STEP_PIXELS).all() and (across <= along).all() and along.sum() >= WHOLE_PIXELS)


def _spans(track: np.ndarray, seconds: int) -> np.ndarray:
    """The height of a track in each stretch of some seconds."""
    return np.array([np.ptp(track[start:start + seconds * FPS + 1, 1])
                     for start in range(0, len(track) - seconds * FPS, FPS)])


def seam(videos: Sequence[np.ndarray], borders: Sequence[int], inside: Sequence[int]) -> float:
    """The mean change into the frames ``borders``, the first after a border, over that into ``inside``.

    Both are the first frames of a latent, where also short videos change more than between the other frames (a latent
    holds four): like is compared with like. The mean of the videos' ratios.
    """
    ratios = []
    for video in videos:
        changes = np.abs(np.diff(video.astype(np.int16), axis=0)).mean((1, 2, 3))
        ratios.append(changes[np.array(borders) - 1].mean() / changes[np.array(inside) - 1].mean())
    return float(np.mean(ratios))


def faint(frames: np.ndarray) -> np.ndarray:
    """The pixels with a little colour in each frame, for each coloured one: [F]. An object that shows a second time
    where it is not, half transparent, has more than its edge."""
    chroma = frames.max(-1).astype(int) - frames.min(-1)
    return ((chroma > FAINT_CHROMA) & (chroma <= evaluate.CHROMA)).sum((1, 2)) / (chroma > evaluate.CHROMA).sum((1, 2))


def similarity(frames: np.ndarray, image: np.ndarray) -> np.ndarray:
    """How much the object of each frame is that of the image (uint8 [H, W, 3]): [F], 1 for the same.

    Moved on each other by their centroids, the share that both cover (intersection over union: shape and size), times
    the cosine between the colours, without grey. Where it is, and the background, do not count. 0 if there is none.
    """
    given = evaluate.masks(image[None])[0]
    at, colour = np.array(evaluate.centroid(given)), evaluate.hue_vector(image[given].mean(0))
    found = []
    for frame, mask in zip(frames, evaluate.masks(frames), strict=True):
        if mask.sum() < evaluate.MIN_AREA:
            found.append(0.0)
            continue
        x, y = np.rint(at - evaluate.centroid(mask)).astype(int)
        moved = np.roll(mask, (y, x), (0, 1))
        cosine = float(evaluate.hue_vector(frame[mask].mean(0)) @ colour)
        found.append((moved & given).sum() / (moved | given).sum() * max(cosine, 0.0))
    return np.array(found)


def of_seconds(values: np.ndarray) -> np.ndarray:
    """The mean of each whole second of a value per frame."""
    count = len(values) // FPS
    return values[:count * FPS].reshape(count, FPS).mean(1)
