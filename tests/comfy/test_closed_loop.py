"""Videos whose end goes over into their beginning: the schedule 'looped', in one window and in several. In process, and
once on a server of each version."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import comfy.sample
import pytest
import torch
from cogx.model_loaders import load
from cogx.model_loaders.text_encoder import encode
from cogx.samplers import adapter
from cogx.samplers.long_video import Window
from cogx.samplers.plan_picture import WIDTH
from cogx.samplers.windows import halving
from cogx.scripts import demo_pipeline
from cogx.tests.comfy.demo import GUIDANCE, TEXT_TOKENS
from cogx.tests.comfy.demo import STEPS as DEMO_STEPS
from cogx.tests.comfy.graphs import latent_only, patched_model, text_to_video, with_core_ksampler
from cogx.tests.comfy.test_context_windows import SETTINGS, load_tiny, noise_of, run, windowed  # noqa: F401 - fixture
from PIL import Image
from torch import Tensor

TIME = 2
PROMPTS = ["A red circle glides from left to right.", "A yellow triangle bounces up and down.",
           "A green circle glides from top to bottom.", "A blue square stands still."]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def rolled(model: Any, total: int, patch: int) -> Any:
    """A clone without windows whose network sees the whole video rolled, by another part of it at each step."""
    model, levels = model.clone(), []

    def roll(x: Tensor, by: int) -> Tensor:
        return x.roll(by, TIME)

    def forward(apply: Any, given: dict[str, Any]) -> Tensor:
        level, conds = float(given["timestep"][0]), dict(given["c"])
        if level not in levels:
            levels.append(level)
        by = round(total // patch * halving(len(levels) - 1)) * patch
        if conds.get("c_concat") is not None:
            conds["c_concat"] = roll(conds["c_concat"], -by)
        return roll(apply(roll(given["input"], -by), given["timestep"], **conds), by)

    model.set_model_unet_function_wrapper(forward)
    return model


@pytest.mark.parametrize("variant, count", [("2B", 1), ("5B", 2), ("5B-I2V", 1), ("1.5-5B-I2V", 2)])
def test_one_window_is_rolled_at_each_step(load_tiny, error, variant, count):  # noqa: F811
    """The same by hand. 1.5 keeps its padding frame, which lies between the last frame and the first. The image stays
    where it is: at each step another frame is the window's first, and one window has no need of an anchor."""
    model = load_tiny(variant)
    patch = model.model.spec.transformer.temporal_patch
    noise, image = noise_of(1, 5, count), noise_of(2, 1, count)
    made = run(windowed(model, schedule="looped", noise="freenoise"), noise, image=image)
    expected = run(rolled(model, 4 + patch, patch), noise, image=image)
    assert made.shape[TIME] == 4 + patch
    assert error(made[:, :, patch - 1:], expected) <= 1e-5
    assert error(expected, run(model, noise, image=image)) > 1e-3, "nothing was rolled"


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_no_frame_is_the_first(load_tiny, error, variant):  # noqa: F811
    """Rolled noise makes the rolled video, by a stride, where the strides divide the video."""
    model = load_tiny(variant)
    patch = model.model.spec.transformer.temporal_patch
    noise = noise_of(1, 12 * patch)
    length, overlap = (17, 8) if patch == 1 else (33, 16)  # 5 and 2 tokens

    def made(schedule: str, given: Tensor) -> Tensor:
        return run(windowed(model, length=length, overlap=overlap, schedule=schedule), given)

    stride = 3 * patch
    loop = made("looped", noise)
    assert loop.shape == noise.shape
    assert error(made("looped", noise.roll(stride, TIME)), loop.roll(stride, TIME)) <= 1e-5
    plain = made("static", noise)
    assert error(made("static", noise.roll(stride, TIME)), plain.roll(stride, TIME)) > 1e-2


def test_features_of_the_inverted_video_are_rolled_too(load_tiny):  # noqa: F811
    """The network sees frame by frame the same part of both."""
    model = load_tiny("5B")
    prompt = [[torch.randn(1, model.model.spec.text_tokens, 32), {}]]
    trajectory = adapter.invert(model, prompt, {"samples": noise_of(4, 5)}, 2)
    seen: list[Tensor] = []

    def executor(x: Tensor, *args: Any) -> Tensor:
        seen.append(x)
        return x

    x, frames = torch.zeros(1, 16, 5, 8, 12), [3, 4, 0, 1, 2]
    options = {"context_window": Window(frames, dim=TIME, total_frames=5), "uuids": [uuid.uuid4()],
               "cond_or_uncond": [0]}
    adapter._forward_beside(trajectory, executor, x, torch.full((1,), 999.0), torch.zeros(1, 3, 2), None, None, options)
    assert torch.equal(seen[0][1:], trajectory.noise[:, :, frames])


def closing(video: Tensor) -> float:
    """The step from the last frame to the first, over the mean of the steps inside: 1 where nothing shows."""
    frames = video.movedim(TIME, 0).flatten(1)
    steps = (frames.roll(-1, 0) - frames).norm(dim=1)
    return float(steps[-1] / steps[:-1].mean())


@pytest.mark.parametrize("latents, clips", [(5, 4), (10, 2)], ids=["one window", "several"])
def test_the_last_frame_meets_the_first(latents, clips):
    """The demo model, in latent space; the same without the loop does not. Means over the clips."""
    folder = demo_pipeline.DEMO / demo_pipeline.MAIN
    model = load.load_model(str(folder / "transformer"))
    clip = load.load_text_encoder(str(folder / "text_encoder"), max_tokens=TEXT_TOKENS)
    negative, sigmas = encode(clip, "", "encode")[0], adapter.make_sigmas(model, DEMO_STEPS, "trailing")
    found: dict[str, list[float]] = {"looped": [], "static": []}
    for seed, prompt in enumerate(PROMPTS[:clips]):
        positive, noise = encode(clip, prompt, "encode")[0], noise_of(seed, latents)
        for schedule, closings in found.items():
            made = comfy.sample.sample_custom(
                windowed(model, schedule=schedule, noise="freenoise"), noise.clone(), GUIDANCE,
                adapter.sampler_object("cogvideox_ddim"), sigmas, positive, negative, torch.zeros_like(noise), seed=3,
                disable_pbar=True)
            closings.append(closing(made))
    assert sum(found["looped"]) / clips <= 1.3 < sum(found["static"]) / clips, found


@pytest.mark.parametrize("host", ["server", "oldest_server"])
def test_on_a_server(request, saved_latent, host):
    running = request.getfixturevalue(host)
    graph = with_core_ksampler(latent_only(text_to_video("1.5-5B")), "euler", "simple", steps=2)
    loop = patched_model(graph, "CogXContextWindows", latent=["4", 0], **{**SETTINGS, "schedule": "looped"})
    loop["4"]["inputs"].pop("model", None)
    loop["21"] = {"class_type": "PreviewAny", "inputs": {"source": ["20", 1]}}
    run = running.run(loop)
    made = saved_latent(running, run)
    assert made.shape == (1, 16, 6, 8, 12) and torch.isfinite(made).all()
    shown = run.outputs["20"]
    assert shown["text"] == run.outputs["21"]["text"]
    plan = json.loads(shown["text"][0])
    first, second = (step[0]["frames"] for step in plan["steps"][:2])
    assert (plan["frames"], first, second) == (21, [[0, 20]], [[13, 20], [0, 12]])
    with Image.open(running.output(run, "20")) as picture:
        assert picture.format == "PNG" and picture.width == WIDTH
