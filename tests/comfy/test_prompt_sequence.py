"""A prompt for each part of a video: encoding, what each window is given, and what it costs. In process, tiny networks,
and once on a server of each version."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.hooks
import comfy.sample
import comfy.samplers
import pytest
import torch
from cogx.model_loaders import load
from cogx.model_loaders.text_encoder import encode, encode_sequence
from cogx.models.cogvideox.image_condition import condition_latent
from cogx.models.turns import TURN
from cogx.samplers import adapter
from cogx.samplers.prompts import in_turn, mix
from cogx.tests.comfy.graphs import latent_only, patched_model, text_to_video, with_core_ksampler
from cogx.tests.comfy.test_context_windows import SETTINGS, noise_of, spied, windowed
from cogx.tests.comfy.test_image_model import with_images
from cogx.tests.comfy_server import PromptError
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from torch import Tensor

STEPS = 3
Entries = list[list[Any]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def load_tiny(tiny_pipelines) -> Callable[[str], Any]:
    return lambda variant: load.load_model(str(tiny_pipelines / variant / "transformer"))


@pytest.fixture(scope="module")
def clip(tiny_pipelines) -> Any:
    return load.load_text_encoder(str(tiny_pipelines / "5B" / "text_encoder"))


def text_of(seed: int, model: Any) -> Tensor:
    return torch.randn(1, model.model.spec.text_tokens, 32, generator=torch.Generator().manual_seed(seed))


def sequence_of(model: Any, count: int, first: int = 20, **options: Any) -> Entries:
    return [[text_of(first + turn, model), {TURN: (turn, count), **options}] for turn in range(count)]


def sample(model: Any, positive: Entries, negative: Entries | None = None, frames: int = 17, count: int = 1,
           cfg: float = 6.0) -> Tensor:
    """Sampled: [B, 16, T, h, w]. Image models get a random image."""
    noise = noise_of(1, frames, count)
    negative = [[text_of(9, model), {}]] if negative is None else negative
    if model.model.spec.takes_image:
        condition = condition_latent(frames, noise_of(2, 1, count), None)
        positive, negative = (with_images(one, condition, "auto") for one in (positive, negative))
    sigmas = adapter.make_sigmas(model, STEPS, "trailing")
    return comfy.sample.sample_custom(model, noise, cfg, adapter.sampler_object("cogvideox_ddim"), sigmas, positive,
                                      negative, torch.zeros_like(noise), seed=3, disable_pbar=True)


def test_each_line_is_encoded_as_alone(clip):
    prompts = ["A red circle glides (softly:1.4).", "It stops."]
    conditioning, counts = encode_sequence(clip, f"\n{prompts[0]}\n  \n {prompts[1]} \n")
    assert [options[TURN] for _, options in conditioning] == [(0, 2), (1, 2)]
    for prompt, count, (embedding, _), turn in zip(prompts, counts, conditioning, in_turn(conditioning), strict=True):
        expected, alone = encode(clip, prompt, "encode")
        assert torch.equal(embedding, expected[0][0]) and count == alone
        assert TURN not in turn[0][1] and torch.equal(turn[0][0], embedding)
    assert encode_sequence(clip, "one\ntwo", 224)[0][0][0].shape[1] == 224


def test_scheduled_on_the_clip(clip):
    """A LoRA on the CLIP with keyframes: each prompt has an entry for each, and each keyframe is one sequence."""
    scheduled = clip.clone()
    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    hooks.set_keyframes_on_hooks(comfy.hooks.HookKeyframeGroup())
    for hook in hooks.hooks:
        hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.5))
    scheduled.patcher.forced_hooks, scheduled.use_clip_schedule = hooks, True
    conditioning, _ = encode_sequence(scheduled, "one\ntwo\nthree")
    assert [(options[TURN][0], options["clip_start_percent"]) for _, options in conditioning] == [
        (0, 0.0), (1, 0.0), (2, 0.0), (0, 0.5), (1, 0.5), (2, 0.5)]


@pytest.mark.parametrize("schedule", ["static", "uniform", "looped", "coarse"])
@pytest.mark.parametrize("variant, count", [("5B", 1), ("1.5-5B-I2V", 2)])
def test_each_window_has_the_prompt_of_its_moment(load_tiny, error, variant, count, schedule):
    """Steps x windows forwards, whatever the number of prompts; each with the embedding between its two prompts.
    A window over the whole video has no one prompt: 'coarse' then has its windows at every step."""
    model, seen = spied(windowed(load_tiny(variant), overlap=8, schedule=schedule))
    positive = sequence_of(model, 3)
    sample(model, positive, frames=21, count=count, cfg=1.0)
    windows = model.model_options["context_handler"].windows
    total = 21 + windows.spec.padding_frames(21)
    planned = [window for step in range(STEPS) for window in windows.at(total, step)]
    assert len(seen) == len(planned)
    between = set()
    for window, given in zip(planned, seen, strict=True):
        middle = (window[0] + len(window) / 2) % total / total
        a, b, share = mix([(i, 3) for i in range(3)], middle, windows.latent_overlap / total, schedule == "looped")
        expected = (1 - share) * positive[a][0] + share * positive[b][0]
        assert given["text"].shape[0] == count and error(given["text"], expected.expand_as(given["text"])) <= 1e-6
        between.add((a, b, 0 < share < 1))
    assert any(mixed for *_, mixed in between) and len({a for a, *_ in between}) == 3
    assert all("c_crossattn" not in options for _, options in positive), "the conditioning was written to"


def test_plain_prompts_keep_their_meaning(load_tiny):
    """Equal prompts in turn are one prompt; entries without turns are mixed as ComfyUI does, each in every window."""
    model = windowed(load_tiny("5B"))
    same = [[text_of(20, model), {TURN: (turn, 4)}] for turn in range(4)]
    assert torch.equal(sample(model, same), sample(model, [[text_of(20, model), {}]]))
    spy, seen = spied(model)
    sample(spy, [[text_of(20, model), {}], [text_of(21, model), {}]], cfg=1.0)
    assert sum(len(given["options"]["uuids"]) for given in seen) == 2 * STEPS * 5


def test_in_areas_and_masks(load_tiny, error):
    """Two sequences, one in an area and one in a mask, for a batch of two: windows side by side are what their three
    pairs of prompts make, put together by hand. One forward more than the prompts: the area's negative."""
    model = load_tiny("5B")
    mask = torch.zeros(1, 64, 96)
    mask[..., 48:] = 1
    positive = (sequence_of(model, 3, 20, area=(8, 6, 0, 0), strength=1.0, set_area_to_bounds=False)
                + sequence_of(model, 3, 30, mask=mask, mask_strength=1.0, set_area_to_bounds=False))
    spy, seen = spied(windowed(model, overlap=0, schedule="batched"))
    made = sample(spy, positive, frames=15, count=2)
    assert sum(len(given["options"]["uuids"]) for given in seen) == STEPS * 3 * 4
    noise, sigmas = noise_of(1, 15, 2), adapter.make_sigmas(model, STEPS, "trailing")
    for turn, prompts in enumerate(in_turn(positive)):
        part = noise[:, :, 5 * turn:5 * turn + 5]
        expected = comfy.sample.sample_custom(
            model, part.clone(), 6.0, adapter.sampler_object("cogvideox_ddim"), sigmas, prompts,
            [[text_of(9, model), {}]], torch.zeros_like(part), seed=3, disable_pbar=True)
        assert error(made[:, :, 5 * turn:5 * turn + 5], expected) <= 1e-5


@pytest.mark.parametrize("frames, windows", [(5, True), (17, False)], ids=["fits into a window", "without windows"])
def test_in_one_piece_the_first_prompt_counts(load_tiny, caplog, frames, windows):
    model = load_tiny("5B")
    expected = sample(model, [[text_of(20, model), {}]], frames=frames)
    caplog.set_level(logging.WARNING, "cogx")
    caplog.clear()
    model = windowed(model) if windows else model
    assert torch.equal(sample(model, sequence_of(model, 3), frames=frames), expected)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "sequence" in line] == [
        "The positive prompts are a sequence, but the video is sampled in one piece: only the first counts. Use "
        "'CogVideoX Context Windows' with a window shorter than the video."]


def test_cores_windows_take_a_sequence(load_tiny, error):
    """ContextWindowsManual with split_conds_to_windows gives each window one of the prompts, as ours with no fade."""
    model = load_tiny("5B")
    core = ContextWindowsManualNode.execute(model, 5, 0, "batched", 1, False, "flat", 2, False,
                                            split_conds_to_windows=True, causal_window_fix=False).args[0]
    ours = windowed(model, overlap=0, schedule="batched", fuse="flat")
    positive = sequence_of(model, 3)
    assert error(sample(ours, positive, frames=15), sample(core, positive, frames=15)) <= 1e-6


def test_a_prompt_that_no_window_shows(load_tiny, caplog):
    caplog.set_level(logging.WARNING, "cogx")
    model = windowed(load_tiny("5B"), overlap=0)
    sample(model, sequence_of(model, 3), frames=15)
    assert "prompt" not in caplog.text
    sample(model, sequence_of(model, 3), frames=10)
    assert ("Context windows: no window has prompt 2 of 3 for its own: there are 2 windows. Use shorter windows or a "
            "longer video.") in caplog.text


@pytest.mark.parametrize("host", ["server", "oldest_server"])
def test_on_a_server(request, saved_latent, error, host):
    running = request.getfixturevalue(host)
    graph = latent_only(text_to_video("5B"))
    graph["4"]["inputs"].update(length=49)
    graph = with_core_ksampler(graph, "euler", "simple", steps=2)
    graph = patched_model(graph, "CogXContextWindows", **SETTINGS)
    plain = saved_latent(running, running.run(graph))
    graph["2"] = {"class_type": "CogXPromptSequence",
                  "inputs": {"clip": graph["2"]["inputs"]["clip"], "text": "A red circle.\n\nIt stops.\nIt glides."}}
    run = running.run(graph)
    assert [line.split(":")[0] for line in run.outputs["2"]["text"][0].split("\n")] == ["1", "2", "3"]
    assert error(saved_latent(running, run), plain) > 1e-4
    graph["2"]["inputs"]["text"] = " \n"
    with pytest.raises(PromptError) as raised:
        running.run(graph)
    assert "text: expected a prompt on each line, got none." in f"{raised.value} {raised.value.details}"


def test_the_guiders_own_entries_are_left(load_tiny):
    """A guider that is used twice has its sequence the second time too."""
    model = load_tiny("5B")
    guider = comfy.samplers.CFGGuider(windowed(model))
    guider.set_conds(sequence_of(model, 3), [[text_of(9, model), {}]])
    guider.set_cfg(6.0)

    def run(frames: int) -> Tensor:
        sigmas = adapter.make_sigmas(model, STEPS, "trailing")
        return guider.sample(noise_of(1, frames), torch.zeros(1, 16, frames, 8, 12),
                             adapter.sampler_object("cogvideox_ddim"), sigmas, disable_pbar=True, seed=3)

    first = run(17)
    run(5)
    assert torch.equal(run(17), first)
