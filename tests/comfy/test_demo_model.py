"""The embedded model shows what its prompt says: through the real graph, and through diffusers from the same files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cogx.scripts import demo_pipeline
from cogx.scripts.demo_model import evaluate
from cogx.scripts.demo_model.evaluate import Case, Scores
from cogx.scripts.demo_model.train_vae import psnr, to_frames, to_pixels
from cogx.tests.comfy.demo import (
    GUIDANCE,
    STEPS,
    TEXT_TOKENS,
    noise_of,
    pictures,
    remembered,
    save_pictures,
)
from cogx.tests.comfy.graphs import Graph, text_to_video
from cogx.tests.comfy_server import ComfyServer

DEMO = demo_pipeline.MAIN


def graph_of(case: Case) -> Graph:
    """The shipped workflow with the embedded model."""
    graph = text_to_video(DEMO, steps=STEPS, cfg=GUIDANCE, seed=case.seed, sampler="cogvideox_ddim", dynamic_cfg=False)
    graph["2"]["inputs"]["text"] = case.prompt
    return save_pictures(graph)


@pytest.fixture(scope="module")
def through_comfyui(server: ComfyServer) -> Callable[[Case], np.ndarray]:
    return remembered(lambda case: pictures(server, server.run(graph_of(case))))


@pytest.fixture(scope="module")
def through_diffusers() -> Callable[[Case], np.ndarray]:
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(demo_pipeline.DEMO / DEMO, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def generate(case: Case) -> np.ndarray:
        video = pipeline(case.prompt, "", height=64, width=96, num_frames=17, num_inference_steps=STEPS,
                         guidance_scale=GUIDANCE, latents=noise_of(case.seed), max_sequence_length=TEXT_TOKENS,
                         output_type="np").frames[0]
        return (video * 255).round().astype(np.uint8)

    return remembered(generate)


def check(scores: Scores) -> None:
    assert scores.count == 48
    assert scores.colour >= 0.95 and scores.motion >= 0.95 and scores.shape >= 0.85, str(scores)


def test_held_out_combinations_through_comfyui(through_comfyui, record_property):
    cases = evaluate.held_out_cases()
    scores = evaluate.evaluate(through_comfyui, cases)
    record_property("scores", str(scores))
    check(scores)


def test_videos_judged_by_other_prompts_are_at_chance(through_comfyui):
    control = evaluate.evaluate(through_comfyui, evaluate.held_out_cases(), shuffled=True)
    # Chance is a sixth, an eighth and a third of 48; four standard deviations above it.
    assert control.colour < 0.38 and control.motion < 0.32 and control.shape < 0.6, str(control)


def test_diffusers_reads_the_folder_and_scores_the_same(through_comfyui, through_diffusers):
    """Some cases, frame by frame; then the scores of all of them, which may differ in one video of the 48."""
    cases = evaluate.held_out_cases()
    for case in cases[::12]:
        difference = through_comfyui(case).astype(int) - through_diffusers(case)
        assert np.abs(difference).max() <= 2, case.prompt
    ours, theirs = (evaluate.evaluate(generate, cases) for generate in (through_comfyui, through_diffusers))
    for name in ("colour", "motion", "shape"):
        assert abs(getattr(ours, name) - getattr(theirs, name)) <= 0.03, f"{ours}; diffusers: {theirs}"


def test_the_vae_reconstructs_held_out_clips():
    from cogx.scripts.demo_model import clips
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(demo_pipeline.DEMO / DEMO / "vae", torch_dtype=torch.float32)
    values = []
    for case in evaluate.held_out_cases()[::2]:
        frames = clips.render(case.scene, np.random.default_rng(case.seed))[0]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(to_pixels(frames[None])).latent_dist.mode()).sample
        values.append(psnr(to_frames(decoded)[0], frames))
    assert np.mean(values) >= 30.0, np.mean(values)


def test_the_embedded_model_is_listed_last_and_its_name_means_no_other(server, tiny_pipelines):
    """A folder that an earlier version made under this name does not hide it."""
    shadow = tiny_pipelines / DEMO
    shadow.mkdir()
    try:
        (shadow / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}', encoding="utf-8")
        choices = server.get("/object_info/CogXLoadPipeline")["CogXLoadPipeline"]["input"]["required"]["pipeline"]
        names = choices[1]["options"] if choices[0] == "COMBO" else choices[0]
        assert names[-1] == DEMO and names.count(DEMO) == 1
        server.run({**{key: graph_of(evaluate.held_out_cases()[0])[key] for key in "12"},
                    "9": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}})
    finally:
        (shadow / "model_index.json").unlink()
        shadow.rmdir()


def test_a_folder_below_that_name_breaks_no_list(server, tiny_pipelines):
    """It is not listed, because its name would mean another folder; the loaders' lists stay whole."""
    nested = tiny_pipelines / DEMO / "mine"
    nested.mkdir(parents=True)
    try:
        (nested / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}', encoding="utf-8")
        for node, name in (("CogXLoadModel", "checkpoint"), ("CogXLoadVAE", "vae")):
            choices = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
            names = choices[1]["options"] if choices[0] == "COMBO" else choices[0]
            assert f"{DEMO}/{'transformer' if name == 'checkpoint' else name}" in names
            assert not [each for each in names if f"{DEMO}/mine" in each]
    finally:
        (nested / "model_index.json").unlink()
        nested.rmdir()
        nested.parent.rmdir()
