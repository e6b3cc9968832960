"""Whether a video shows what its prompt says: colour, motion and shape of the one coloured thing in it.

``evaluate`` takes any function from a case (prompt, seed, first frame) to frames, so that every way to run the model is
judged by the same rules. Nothing here knows the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import clips
from .clips import Scene

# Backgrounds have a chroma (largest minus smallest channel) near 0, shapes one of 160 and more.
CHROMA = 80
MIN_AREA = 100  # pixels; the smallest shape has 314
MIN_VISIBLE = 0.8  # share of the frames that must show a shape at all
STILL_PIXELS, BOUNCE_PIXELS = 5.0, 10.0  # "still" moves less, "bounce" more; slow motions cover 9 to 13


@dataclass(frozen=True)
class Case:
    """One video to make: ``image`` (uint8 [HEIGHT, WIDTH, 3]) is the first frame for image to video."""

    scene: Scene
    prompt: str
    seed: int
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Seen:
    """What a video shows; None where there is nothing to be seen."""

    shape: str | None = None
    colour: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Scores:
    """Shares from 0 to 1 of the videos in which each attribute is right."""

    shape: float
    colour: float
    motion: float
    count: int

    def __str__(self) -> str:
        return f"colour {self.colour:.1%}, motion {self.motion:.1%}, shape {self.shape:.1%} of {self.count} videos"


def masks(frames: np.ndarray) -> np.ndarray:
    """Where the coloured thing is: bool [F, H, W]."""
    return frames.max(-1).astype(int) - frames.min(-1) > CHROMA


def centroid(mask: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(mask)
    return float(x.mean() + 0.5), float(y.mean() + 0.5)


def hue_vector(rgb: np.ndarray) -> np.ndarray:
    """The direction of a colour in colour space, without grey: [3], of length 1."""
    centred = rgb - rgb.mean()
    return centred / np.linalg.norm(centred)


def colour_of(frames: np.ndarray, mask: np.ndarray) -> str:
    """The colour whose direction in colour space, without grey, is nearest to that of the mean coloured pixel."""
    mean = hue_vector(frames[mask].mean(0))
    return max(clips.COLOURS, key=lambda name: float(hue_vector(np.array(clips.COLOURS[name], float)) @ mean))


def motion_of(track: np.ndarray) -> str | None:
    """The motion of a track of centroids [F, 2] (x, y), or None if it is none of the known ones."""
    spread = np.ptp(track, axis=0)
    if spread.max() < STILL_PIXELS:
        return "still"
    travelled, net = np.abs(np.diff(track[:, 1])).sum(), abs(track[-1, 1] - track[0, 1])
    if spread[1] > max(BOUNCE_PIXELS, 2 * spread[0]) and travelled > 1.5 * net + STILL_PIXELS:
        return "bounce"
    x, y = track[-3:].mean(0) - track[:3].mean(0)
    octant = round(math.degrees(math.atan2(-y, x)) / 45) % 8
    return {0: "right", 1: "up right", 2: "up", 4: "left", 5: "down left", 6: "down"}.get(octant)


def shape_of(frame_masks: np.ndarray) -> str:
    """The shape whose template of the same area and place covers the masks best (intersection over union)."""
    overlap = dict.fromkeys(clips.SHAPES, 0.0)
    for mask in frame_masks:
        radius = math.sqrt(mask.sum() / math.pi)
        for shape in clips.SHAPES:
            template = clips.coverage(shape, centroid(mask), radius) > 0.5
            overlap[shape] += (template & mask).sum() / (template | mask).sum()
    return max(overlap, key=lambda shape: overlap[shape])


def look(frames: np.ndarray) -> Seen:
    """What a video (uint8 [F, H, W, 3]) shows."""
    found = masks(frames)
    visible = found.sum((1, 2)) >= MIN_AREA
    if visible.mean() < MIN_VISIBLE:
        return Seen()
    track = np.array([centroid(mask) for mask in found[visible]])
    return Seen(shape_of(found[visible]), colour_of(frames, found), motion_of(track))


def evaluate(generate: Callable[[Case], np.ndarray], cases: Sequence[Case], shuffled: bool = False) -> Scores:
    """The scores of ``generate`` (case to uint8 [F, H, W, 3]) over ``cases``.

    ``shuffled`` is the control: every video is judged by a scene that was not its own, so scores must fall to chance.
    """
    seen = [look(generate(case)) for case in cases]
    wanted = [case.scene for case in cases]
    if shuffled:
        order = [int(index) for index in np.random.default_rng(0).permutation(len(wanted))]
        other = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: nobody keeps its own
        wanted = [wanted[other[index]] for index in range(len(wanted))]
    share = {name: float(np.mean([getattr(a, name) == getattr(b, name) for a, b in zip(seen, wanted, strict=True)]))
             for name in ("shape", "colour", "motion")}
    return Scores(**share, count=len(cases))


# --- The cases ---


def held_out_cases() -> list[Case]:
    """The 48 held-out scenes, each with one of its sentences."""
    return cases_of(clips.held_out_scenes(), seed=2)


def training_cases() -> list[Case]:
    """As many scenes of kinds that were trained, for comparison."""
    rng = np.random.default_rng(3)
    return cases_of([replace(clips.training_scene(rng), speed="normal") for _ in range(48)], seed=3)


def image_cases() -> list[Case]:
    """The 48 held-out scenes, slow, with first frames that have room for a slow motion in any direction, so that they
    give nothing away. (For a bounce of the trained height some have too little: it must be a lower one.)"""
    rng = np.random.default_rng(4)
    scenes = [replace(scene, speed="slow") for scene in clips.held_out_scenes()]
    return [replace(case, image=clips.first_frame(case.scene, rng)) for case in cases_of(scenes, seed=4)]


def cases_of(scenes: Sequence[Scene], seed: int) -> list[Case]:
    """Of scenes, each with one of its sentences."""
    rng = np.random.default_rng(seed)
    return [Case(scene, clips.describe(scene, rng), seed=1000 * seed + index) for index, scene in enumerate(scenes)]
