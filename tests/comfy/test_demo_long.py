"""The embedded models at four times the length they were trained on: in context windows a video holds together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import numpy as np
import pytest
import torch
from cogx.model_loaders import load
from cogx.model_loaders.images import ImageOptions, encode_condition, with_images
from cogx.model_loaders.text_encoder import encode
from cogx.models.specs import Geometry, ModelSpec
from cogx.samplers import adapter
from cogx.samplers.long_video import with_context_windows
from cogx.samplers.windows import Windows
from cogx.scripts import demo_pipeline
from cogx.scripts.demo_model import clips, evaluate
from cogx.scripts.demo_model.evaluate import Case
from cogx.scripts.demo_model.evaluate_long import (
    LONG_FRAMES,
    SEAM_RATIO,
    faint,
    judge,
    long_cases,
    long_image_cases,
    of_seconds,
    seam,
    similarity,
)
from cogx.tests.comfy.demo import GUIDANCE
from torch import Tensor

STEPS = 12  # the fewest that show it, because of the time; with 20 the figures are the same
WINDOWS = {"overlap": 8, "schedule": "coarse", "fuse": "pyramid", "noise": "freenoise", "anchor": True,
           "positions": "window"}
# The first frames of the latents at which the windows of 5 latents over 17, 3 apart, begin or end; and of the others.
BORDERS = [4 * latent - 3 for latent in (3, 5, 6, 8, 9, 11, 12, 14)]
INSIDE = [frame for frame in range(1, LONG_FRAMES, 4) if frame not in BORDERS]
# Where windows begin in the middle of the others that they overlap, and frames far from it.
BEGIN = [frame for start in (21, 33, 45) for frame in range(start, start + 4)]
MIDDLE = [14, 15, 16, 26, 27, 28, 38, 39, 40]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def conditionings(folder: Path, spec: ModelSpec, vae: Any, cases: Sequence[Case], frames: int) -> list[Any]:
    """Positive and negative, a prompt and an image for each video of the batch."""
    clip = load.load_text_encoder(str(folder / "text_encoder"), "auto", "none", spec.text_tokens)
    texts = [encode(clip, case.prompt, "encode")[0][0][0] for case in cases]
    pair = [[[torch.cat(texts), {}]], encode(clip, "", "encode")[0]]
    images = [case.image for case in cases if case.image is not None]
    if images:
        start = torch.from_numpy(np.stack(images)).float() / 255
        geometry = Geometry(spec, clips.WIDTH, clips.HEIGHT, frames)
        condition, _ = encode_condition(vae, geometry, start, None, ImageOptions())
        pair = [with_images(each, condition, "auto") for each in pair]
    return pair


def sampled(folder: Path, cases: Sequence[Case], frames: int, windows: dict[str, Any] | None) -> np.ndarray:
    """All cases in one batch, each from the noise of its seed: uint8 [N, F, H, W, 3]. In bf16, for half the time."""
    model, vae = load.load_model(str(folder / "transformer"), "bf16"), load.load_vae(str(folder / "vae"), "bf16")
    spec = model.model.spec
    positive, negative = conditionings(folder, spec, vae, cases, frames)
    if windows is not None:
        model = with_context_windows(model, Windows(spec, clips.FRAMES, **windows))
    empty = torch.zeros(Geometry(spec, clips.WIDTH, clips.HEIGHT, frames).latent_shape())
    noise = torch.cat([comfy.sample.prepare_noise(empty, case.seed) for case in cases])
    latents = comfy.sample.sample_custom(
        model, noise, GUIDANCE, adapter.sampler_object("cogvideox_ddim", STEPS),
        adapter.make_sigmas(model, STEPS, "trailing"), positive, negative, torch.zeros_like(noise), seed=0,
        disable_pbar=True)
    return np.stack([_pixels(vae, latent) for latent in latents])


def _pixels(vae: Any, latent: Tensor) -> np.ndarray:
    return (vae.decode(latent[None])[0] * 255).round().byte().numpy()


def test_the_motion_goes_on_and_no_seam_shows(record_property):
    cases = long_cases()
    videos = sampled(demo_pipeline.DEMO / demo_pipeline.MAIN, cases, LONG_FRAMES, WINDOWS)
    judged = [judge(video, case.scene) for video, case in zip(videos, cases, strict=True)]
    good, change = sum(each.good for each in judged), seam(videos, BORDERS, INSIDE)
    record_property("scores", f"good {good} of {len(cases)}, seam {change:.2f}")
    wrong = [(case.prompt, each) for case, each in zip(cases, judged, strict=True) if not each.good]
    assert good >= 0.9 * len(cases), wrong
    assert all(each.colour for each in judged), wrong
    assert change <= SEAM_RATIO, change


def test_clips_one_after_another_do_not_hold_together():
    """The control: four clips of the same prompt, put together. One case of each motion."""
    cases = long_cases()[:8]
    assert {case.scene.motion for case in cases} == set(clips.MOTIONS)
    parts = [replace(case, seed=case.seed + 100 * part) for part in range(4) for case in cases]
    made = sampled(demo_pipeline.DEMO / demo_pipeline.MAIN, parts, clips.FRAMES, None)
    joined = np.concatenate(np.split(made, 4), axis=1)[:, :LONG_FRAMES]
    assert not any(judge(video, case.scene).good for video, case in zip(joined, cases, strict=True))
    starts = [17, 34, 51]
    inside = [start + frame for start in (0, *starts) for frame in (1, 5, 9, 13)]
    assert seam(joined, starts, inside) > SEAM_RATIO


@pytest.fixture(scope="module")
def image_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_pipeline.assemble("CogX-Demo-I2V", tmp_path_factory.mktemp("demo") / "i2v")


def test_the_motion_goes_on_from_an_image(image_pipeline, record_property):
    """One case of each motion. Nor does the object show a second time, where the image has it, as windows begin."""
    cases = long_image_cases()[:8]
    assert {case.scene.motion for case in cases} == set(clips.MOTIONS)
    videos = sampled(image_pipeline, cases, LONG_FRAMES, WINDOWS)
    judged = [judge(video, case.scene) for video, case in zip(videos, cases, strict=True)]
    second = np.mean([faint(video)[BEGIN].mean() for video in videos])
    second /= np.mean([faint(video)[MIDDLE].mean() for video in videos])
    record_property("scores", f"good {sum(each.good for each in judged)} of {len(cases)}, faint {second:.2f}")
    assert sum(each.good for each in judged) >= 7, judged
    assert second <= 1.2, second


@pytest.fixture(scope="module")
def similarities(image_pipeline) -> Callable[[bool], np.ndarray]:
    """With the anchor or without, how like the given object the videos are: [8, seconds], each second against the
    first."""

    def measure(anchor: bool) -> np.ndarray:
        cases = evaluate.image_cases()[::6]
        videos = sampled(image_pipeline, cases, LONG_FRAMES, {**WINDOWS, "anchor": anchor})
        each = np.stack([of_seconds(similarity(video, case.image)) for video, case in zip(videos, cases, strict=True)
                         if case.image is not None])
        return each / each[:, :1]

    return measure


def test_the_anchor_keeps_the_given_object(similarities, record_property):
    kept = similarities(True)
    record_property("worst second of each video", str(kept.min(1).round(3)))
    assert kept.min() >= 0.9, kept.min(1)


def test_without_the_anchor_it_is_kept_in_no_video(similarities):
    """The control: later windows see no image, which the model was never trained for."""
    lost = similarities(False)
    assert lost.min(1).max() < 0.9, lost.min(1)
