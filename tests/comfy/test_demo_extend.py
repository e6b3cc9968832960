"""What an extended video shows, on the embedded image-to-video model: its object, the motion, and no seam."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cogx.model_loaders import load
from cogx.scripts import demo_pipeline
from cogx.scripts.demo_model import clips, evaluate
from cogx.scripts.demo_model.clips import Scene
from cogx.tests.comfy.demo import GUIDANCE
from cogx.tests.comfy.test_extend import TILING, Direct
from torch import Tensor

CHUNKS, LENGTH, OVERLAP, STEPS = 3, 17, 9, 15
LATENT = 4  # frames of a latent frame
MOTIONS = ("left", "right", "up", "down", "up right", "down left")


@dataclass(frozen=True)
class Clip:
    """A finished video that leaves its shape room to go on."""

    scene: Scene
    prompt: str
    frames: Tensor  # [17, 64, 96, 3]
    seed: int


def track(frames: np.ndarray) -> np.ndarray:
    """The shape's centre in each frame, [F, 2]; nan where there is none."""
    y, x = np.mgrid[:clips.HEIGHT, :clips.WIDTH] + 0.5
    with np.errstate(invalid="ignore"):
        return np.array([[(x * mask).sum(), (y * mask).sum()] / np.float64(mask.sum() if mask.sum() >= 100 else np.nan)
                         for mask in evaluate.masks(frames)])


def clip_of(motion: str) -> Clip:
    """A slow one of a held-out combination, so drawn that its track goes on inside the frame."""
    scene = replace(next(s for s in clips.held_out_scenes() if s.motion == motion), speed="slow")
    edge = np.array([14.0, 14.0])
    for seed in range(10_000):
        frames = clips.render(scene, np.random.default_rng(seed))[0]
        centres = track(frames)
        goal = centres[-1] + (centres[-1] - centres[0]) * CHUNKS * (LENGTH - OVERLAP) / (LENGTH - 1)
        if ((goal > edge) & (goal < (clips.WIDTH, clips.HEIGHT) - edge)).all():
            pixels = torch.from_numpy(frames).float() / 255
            return Clip(scene, clips.describe(scene, np.random.default_rng(seed)), pixels, seed)
    raise AssertionError(f"no room for {motion}")


class Studio:
    """The embedded model, and the two ways to make a longer video."""

    def __init__(self, folder: Path) -> None:
        self.model = load.load_model(str(folder / "transformer"))
        self.vae = load.load_vae(str(folder / "vae"))
        self._clip = load.load_text_encoder(str(folder / "text_encoder"))

    def _prompt(self, text: str) -> Any:
        return self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))

    def extended(self, clip: Clip, chunks: int = CHUNKS, overlap: int = OVERLAP) -> Tensor:
        return Direct.execute(
            self.model, self._prompt(clip.prompt), self._prompt(""), self.vae, clip.frames, chunks, LENGTH, overlap,
            clip.seed, STEPS, GUIDANCE, "cogvideox_ddim", "trailing", 0.85, False, "full", **TILING).args[0]

    def independent(self, clip: Clip) -> Tensor:
        """The control: clips that begin with the video's first frame, one after the other."""
        start = replace(clip, frames=clip.frames[:1])
        parts = [self.extended(replace(start, seed=clip.seed + i), 1, 1)[:LENGTH - OVERLAP] for i in range(CHUNKS)]
        return torch.cat([clip.frames, *parts])


def bytes_of(video: Tensor) -> np.ndarray:
    return (video * 255).round().byte().numpy()


def seam(frames: np.ndarray) -> float:
    """The change from frame to frame where chunks meet, against that inside of chunks, where latent frames meet: any
    video of these models changes more there, and chunks always meet there."""
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    places = np.arange(LENGTH - 1, len(change), LATENT)
    borders = np.isin(places, np.arange(LENGTH - 1, len(change), LENGTH - OVERLAP))
    return float(change[places[borders]].mean() / change[places[~borders]].mean())


def goes_on(frames: np.ndarray, scene: Scene) -> list[bool]:
    """Of each chunk, whether its shape moves as the scene says: its direction within 45 degrees."""
    centres = track(frames)
    moved = [centres[end] - centres[end - (LENGTH - OVERLAP)]
             for end in range(2 * LENGTH - OVERLAP - 1, len(frames), LENGTH - OVERLAP)]
    wanted = np.array(clips.DIRECTIONS[str(scene.motion)])
    return [bool(move @ wanted > 1.0 and move @ wanted > 0.7071 * np.linalg.norm(move)) for move in moved]


def keeps_colour(frames: np.ndarray, scene: Scene) -> list[bool]:
    """Of each second."""
    return [bool(mask.any()) and evaluate.colour_of(part, mask) == scene.colour
            for part in np.split(frames[1:], range(clips.FPS, len(frames) - 1, clips.FPS))
            for mask in [evaluate.masks(part)]]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(demo_pipeline.assemble("CogX-Demo-I2V", tmp_path_factory.mktemp("demo") / "I2V"))


@pytest.fixture(scope="module")
def videos(studio: Studio) -> Iterator[list[tuple[Clip, np.ndarray]]]:
    with torch.inference_mode():
        yield [(clip, bytes_of(studio.extended(clip))) for clip in map(clip_of, MOTIONS)]


def test_the_object_and_its_motion_go_on(videos, record_property):
    """Three chunks on a clip of 17 frames, in every direction."""
    colours = [kept for clip, frames in videos for kept in keeps_colour(frames, clip.scene)]
    motions = [kept for clip, frames in videos for kept in goes_on(frames, clip.scene)]
    record_property("colour", str(np.mean(colours)))
    record_property("motion", str(np.mean(motions)))
    assert np.mean(colours) >= 0.9 and np.mean(motions) >= 0.9, [goes_on(f, c.scene) for c, f in videos]


def test_no_seam_and_the_control_has_one(studio, videos, record_property):
    seams = [seam(frames) for _, frames in videos]
    with torch.inference_mode():
        control = [seam(bytes_of(studio.independent(clip))) for clip, _ in videos[:2]]
    record_property("seams", str(seams))
    record_property("control", str(control))
    assert np.mean(seams) <= 1.3, seams
    assert min(control) > 1.3, control
