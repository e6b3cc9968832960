"""Context windows on a MODEL: what the network is given, what comes back, what it costs. In process, tiny networks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.sample
import pytest
import torch
from cogx.model_loaders import load
from cogx.models.cogvideox.image_condition import condition_latent, padded_condition
from cogx.models.cogvideox.positions import PLACE_KEY
from cogx.models.specs import SpecError
from cogx.samplers import adapter
from cogx.samplers.inversion import InvertedNoise
from cogx.samplers.long_video import Window, WindowHandler, with_context_windows
from cogx.samplers.windows import FUSES, SCHEDULES, Windows
from cogx.scripts import demo_pipeline
from cogx.tests.comfy.graphs import image_to_video, latent_only, patched_model, text_to_video, with_core_ksampler
from cogx.tests.comfy.test_image_model import conditionings
from cogx.tests.comfy_server import PromptError
from comfy.context_windows import IndexListContextWindow
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from torch import Tensor

VARIANTS = ["2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V"]
LATENTS = 13  # 49 frames
STEPS = 3
SETTINGS = {"length": 17, "overlap": 8, "schedule": "uniform", "fuse": "pyramid", "noise": "freenoise", "anchor": True,
            "positions": "window"}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def load_tiny(tiny_pipelines) -> Callable[[str], Any]:
    return lambda variant: load.load_model(str(tiny_pipelines / variant / "transformer"))


def noise_of(seed: int, frames: int = LATENTS, count: int = 1) -> Tensor:
    return torch.randn(count, 16, frames, 8, 12, generator=torch.Generator().manual_seed(seed))


def windows_of(model: Any, length: int = 17, overlap: int = 8, schedule: str = "static", fuse: str = "pyramid",
               noise: str = "independent", anchor: bool = True, positions: str = "window") -> Windows:
    return Windows(model.model.spec, length, overlap, schedule, fuse, noise, anchor, positions)


def windowed(model: Any, **settings: Any) -> Any:
    return with_context_windows(model, windows_of(model, **settings))


def run(model: Any, noise: Tensor, sampler: str = "cogvideox_ddim", cfg: float = 6.0, image: Tensor | None = None,
        seed: int = 3) -> Tensor:
    """Sampled: [B, 16, T, h, w]. Image models get ``image`` [N, 16, 1, h, w] on the first frame, or a random one."""
    condition = None
    if model.model.spec.takes_image:
        image = noise_of(2, 1, noise.shape[0]) if image is None else image
        condition = condition_latent(noise.shape[2], image, None)
    positive, negative = conditionings(model, condition)
    sigmas = adapter.make_sigmas(model, STEPS, "trailing")
    return comfy.sample.sample_custom(model, noise.clone(), cfg, adapter.sampler_object(sampler), sigmas, positive,
                                      negative, torch.zeros_like(noise), seed=seed, disable_pbar=True)


def spied(model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A clone that notes what each forward is given."""
    model, seen = model.clone(), []

    def apply_model(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                    control: Any = None, transformer_options: Any = None, **conds: Any) -> Tensor:
        made = executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
        seen.append({"x": x, "t": t, "image": c_concat, "text": c_crossattn, "ofs": conds.get("ofs"), "made": made,
                     "options": dict(transformer_options)})
        return made

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", apply_model)
    return model, seen


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames", [5, 3], ids=["covers", "longer than the video"])
def test_one_window_that_covers_everything(load_tiny, caplog, variant, frames):
    model = load_tiny(variant)
    caplog.set_level("INFO", "cogx")
    noise = noise_of(1, frames)
    expected = run(model, noise)
    for kind in ("independent", "freenoise", "repeated"):
        assert torch.equal(run(windowed(model, noise=kind), noise), expected)
    said = [r.getMessage() for r in caplog.records if "Context windows" in r.getMessage()]
    assert said == [f"Context windows: {4 * frames - 3} frames fit into one window of 17, so there are none."] * 3


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fuse", FUSES)
def test_weights_sum_to_one(load_tiny, error, variant, schedule, fuse):
    """Core's loop with our windows and weights, at every step and length: windows of ones make a video of ones, and
    others the mean by the weights of the plan."""
    model = load_tiny(variant)
    windows = windows_of(model, schedule=schedule, fuse=fuse)
    sigmas = torch.linspace(9, 0, 10)
    seen, calls = set(), []

    def calc(model: Any, conds: Any, part: Tensor, timestep: Tensor, options: Any) -> list[Tensor]:
        seen.add((part.shape[2], len(timestep)))
        calls.append(len(calls) + 1)
        return [torch.ones_like(part), torch.full_like(part, calls[-1])]

    for total in range(windows.latent_frames + 2, 40, 2):
        x = torch.zeros(2, 16, total, 2, 2)
        for step, sigma in enumerate(sigmas[:-1]):
            calls.clear()
            options = {"transformer_options": {"sample_sigmas": sigmas}}
            ones, numbers = WindowHandler(windows).execute(calc, model.model, [[{"model_conds": {}}], None], x,
                                                           sigma.expand(2), options)
            assert float((ones - 1).abs().max()) < 1e-6
            if windows.lays_out(total, float(model.model.model_sampling.timestep(sigma))):
                assert calls == [1] and bool((numbers == 1).all())
                continue
            sums, expected = torch.zeros(total), torch.zeros(total)
            for number, window in enumerate(windows.at(total, step), 1):
                shares = torch.tensor(windows.weights_of(window, total))
                sums[window] += shares
                expected[window] += number * shares
            assert error(numbers[0, 0, :, 0, 0], expected / sums) < 1e-6
    assert seen == {(windows.latent_frames, 2)}, "a window of another length, or a part of the timestep"


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_what_no_window_has_seen_lies_between_what_one_has(load_tiny, variant):
    """A first step of 'coarse' that sees in each frame when it is, and in the second condition twice that."""
    model = load_tiny(variant)
    handler, sigmas = WindowHandler(windows_of(model, schedule="coarse")), model.model.model_sampling.sigmas
    options = {"transformer_options": {"sample_sigmas": sigmas.flip(0)}}
    for total in (14, 26, 38):
        frames = torch.arange(total).float()
        if variant == "1.5-5B":
            frames = frames // 2  # both frames of a token at once
        x = frames[:, None, None].expand(2, 16, total, 4, 6)
        made = WindowHandler(handler.windows).execute(lambda _, conds, part, *rest: [part, 2 * part], model.model,
                                                      [None, None], x, sigmas[-1:].expand(2), options)
        assert torch.allclose(made[0], x) and torch.allclose(made[1], 2 * x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_network_is_given(load_tiny, variant, schedule):
    """Steps x windows forwards, each of a whole window: its frames, its part of the image with the anchor, and all of
    the timestep, the text and ofs; for a batch of two."""
    model, seen = spied(windowed(load_tiny(variant), schedule=schedule))
    windows = model.model_options["context_handler"].windows
    noise, image = noise_of(1, count=2), noise_of(2, 1, 2)
    run(model, noise, cfg=1.0, image=image)
    padding = windows.spec.padding_frames(LATENTS)
    total, timesteps = LATENTS + padding, (999, 666, 333)
    planned = [window for step, timestep in enumerate(timesteps) for window in
               ([windows.overview(total)] if windows.lays_out(total, timestep) else windows.at(total, step))]
    assert len(seen) == len(planned) > STEPS
    condition = padded_condition(condition_latent(LATENTS, image, None) * windows.spec.image_scale("auto"), padding)
    for window, given in zip(planned, seen, strict=True):
        assert given["x"].shape == (2, 16, windows.latent_frames, 8, 12) and given["t"].shape == (2,)
        assert given["text"].shape == (2, windows.spec.text_tokens, 32) and PLACE_KEY not in given["options"]
        assert (given["ofs"] is not None) == bool(windows.spec.transformer.ofs_embed_dim)
        assert given["options"]["context_window"].index_list == window
        if windows.spec.takes_image:
            expected = condition[:, :, window].clone()
            expected[:, :, 0] = condition[:, :, 0]
            assert torch.allclose(given["image"], expected) != (schedule == "coarse" and window[0] > 0)


@pytest.mark.parametrize("variant, reference, shown", [
    ("5B-I2V", "auto", 0.7), ("1.5-5B-I2V", "auto", 1.0), ("1.5-5B-I2V", "diffusers", 1 / 0.7)])
def test_where_it_was_laid_out_a_window_begins_with_what_the_one_before_made(load_tiny, variant, reference, shown):
    """With a quarter of the image, in the image's scale; one image serves a batch of two."""
    model, seen = spied(windowed(load_tiny(variant), schedule="coarse"))
    windows, noise = model.model_options["context_handler"].windows, noise_of(1, count=2)
    image, scale = noise_of(2, 1)[:, :, 0], shown / windows.spec.latent.scaling_factor
    prompts = conditionings(model, condition_latent(LATENTS, image[:, :, None], None), reference)
    comfy.sample.sample_custom(model, noise, 1.0, adapter.sampler_object("cogvideox_ddim"),
                               adapter.make_sigmas(model, STEPS, "trailing"), *prompts, torch.zeros_like(noise),
                               seed=3, disable_pbar=True)
    planned = windows.at(LATENTS + windows.spec.padding_frames(LATENTS), STEPS - 1)
    drawn = seen[-len(planned):]
    for before, window, last, given in zip(planned, planned[1:], drawn, drawn[1:], strict=False):
        carried = scale * last["made"][:, :, before.index(window[0])]
        assert torch.allclose(given["image"][:, :, 0], 0.75 * carried + 0.25 * image * shown, atol=1e-6)
        assert not given["image"][:, :, 1:].any()


def test_a_step_that_is_tried_again_begins_with_the_start_image(load_tiny):
    """Of the one that broke off, in its second window, nothing is left."""
    model = load_tiny("5B-I2V")
    handler, sigmas = WindowHandler(windows_of(model, schedule="coarse")), model.model.model_sampling.sigmas
    image = comfy.conds.CONDNoiseShape(condition_latent(LATENTS, torch.ones(1, 16, 1, 8, 12), None))
    options = {"transformer_options": {"sample_sigmas": sigmas.flip(0)}}
    begins: list[float] = []

    def calc(model: Any, conds: Any, part: Tensor, *rest: Any) -> list[Tensor]:
        begins.append(float(conds[0][0]["model_conds"]["c_concat"].cond[:, :, 0].mean()))
        if len(begins) == 2:
            raise RuntimeError("no")
        return [torch.full_like(part, 5.0)]

    def step() -> None:
        handler.execute(calc, model.model, [[{"model_conds": {"c_concat": image}}]], noise_of(1), sigmas[:1], options)

    with pytest.raises(RuntimeError, match="no"):
        step()
    step()
    assert begins[0] == begins[2] == 1.0 and begins[1] == begins[3] > 2.0


@pytest.mark.parametrize("variant", ["5B-I2V", "1.5-5B-I2V"])
def test_without_the_anchor_later_windows_see_no_image(load_tiny, variant):
    model, seen = spied(windowed(load_tiny(variant), anchor=False))
    run(model, noise_of(1), cfg=1.0)
    assert [bool(given["image"].any()) for given in seen[:3]] == [True, False, False]


def test_only_the_image_and_masks_have_time(load_tiny):
    """A video of as many frames as the text has values, tokens, or videos."""
    handler = windowed(load_tiny("1.5-5B-I2V")).model_options["context_handler"]
    for total in (32, 224):
        x = torch.zeros(1, 16, total, 2, 2)
        window = handler.get_context_windows(None, x, {})[1]
        conds = {name: comfy.conds.CONDRegular(value) for name, value in
                 {"c_crossattn": torch.rand(1, 224, 32), "ofs": torch.full((total,), 2.0)}.items()}
        conds["c_concat"] = comfy.conds.CONDNoiseShape(torch.rand(1, 16, total, 2, 2))
        mask, text = torch.rand(1, total, 2, 2), torch.rand(1, 224, 32)
        whole = {"cross_attn": text, "mask": mask, "area": (2, 2, 0, 0), "strength": 0.5, "model_conds": conds}
        part = handler.get_resized_cond([whole], x, window)[0]
        assert all(part["model_conds"][name] is conds[name] for name in ("c_crossattn", "ofs"))
        assert all(part[name] is whole[name] for name in ("cross_attn", "area", "strength"))
        assert torch.equal(part["mask"], mask[:, window.index_list])
        image, given = conds["c_concat"].cond, part["model_conds"]["c_concat"].cond
        assert torch.equal(given, image[:, :, [0, 1, *window.index_list[2:]]]), "the anchor is a whole token"


@pytest.mark.parametrize("sampler", ["cogvideox_ddim", "dpmpp_2m"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_video_of_a_batch_as_alone(load_tiny, error, variant, sampler):
    model = windowed(load_tiny(variant), schedule="uniform", noise="freenoise")
    noise, image = noise_of(1, count=2), noise_of(2, 1, 2)
    both = run(model, noise, sampler, image=image)
    for i in range(2):
        assert error(both[i:i + 1], run(model, noise[i:i + 1], sampler, image=image[i:i + 1])) <= 1e-5


# Core's looped windows begin between the two latent frames of 1.5's tokens, so only those of 1.0 are right.
SAME = [(variant, *names) for variant in VARIANTS for names in [
    ("static", "pyramid", "standard_static"), ("static", "relative", "standard_static"), ("batched", "flat", "batched"),
    *([] if variant.startswith("1.5") else [("looped", "pyramid", "looped_uniform")])]]


@pytest.mark.parametrize("variant, schedule, fuse, core_schedule", SAME)
def test_equals_core_where_both_are_right(load_tiny, error, variant, schedule, fuse, core_schedule):
    """One video, no frame before a window, a length that batched windows divide. To the bit, but for 'relative', which
    core adds up in another order."""
    model = load_tiny(variant)
    windows = windows_of(model, schedule=schedule, fuse=fuse, noise="freenoise")
    patch = model.model.spec.transformer.temporal_patch
    frames = 3 * windows.latent_frames - (patch - 1)  # three windows side by side, 1.5's padding frame in the first
    core = ContextWindowsManualNode.execute(
        model, windows.latent_frames, windows.latent_overlap, core_schedule, 1, schedule == "looped", fuse, 2,
        True, cond_retain_index_list="0", causal_window_fix=False).args[0]
    noise = noise_of(1, frames)
    ours, theirs = run(with_context_windows(model, windows), noise), run(core, noise)
    assert error(ours, theirs) <= (1e-5 if fuse == "relative" else 0)
    assert error(ours, run(model, noise)) > 1e-3, "windows did nothing"


def test_the_last_of_the_two_nodes_counts(load_tiny):
    """Ours after core's and core's after ours, noise included."""
    model, noise = load_tiny("5B"), noise_of(1)

    def core(model: Any) -> Any:
        return ContextWindowsManualNode.execute(model, 5, 1, "standard_static", 1, False, "flat", 2, True,
                                                causal_window_fix=False).args[0]

    ours = windowed(model, noise="freenoise")
    assert torch.equal(run(windowed(core(model), noise="freenoise"), noise), run(ours, noise))
    assert torch.equal(run(core(ours), noise), run(core(model), noise))
    twice = windowed(windowed(model, noise="repeated", schedule="looped"), noise="freenoise")
    assert torch.equal(run(twice, noise), run(ours, noise))
    assert "context_handler" not in model.model_options


def test_a_run_leaves_nothing_behind(load_tiny):
    model = windowed(load_tiny("5B"), schedule="uniform")
    noise = noise_of(1)
    first = run(model, noise)
    handler = model.model_options["context_handler"]
    assert handler._step == 0 and not hasattr(handler, "_model")
    assert torch.equal(run(model, noise), first)


def test_the_memory_that_is_asked_for_is_that_of_a_window(load_tiny):
    model, asked = windowed(load_tiny("5B")), []

    def prepare(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(list(shape))
        return executor(model, shape, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", prepare)
    run(model, noise_of(1, count=2))
    assert asked == [[2, 16, 5, 8, 12]]


@pytest.mark.parametrize("schedule", ["static", "coarse"])
@pytest.mark.parametrize("variant", ["2B", "5B", "1.5-5B"])
def test_global_positions(load_tiny, error, variant, schedule):
    """The network is told where each window lies, and makes another video of it."""
    model, noise = load_tiny(variant), noise_of(1)
    spy, seen = spied(windowed(model, schedule=schedule, positions="global"))
    assert error(run(spy, noise, cfg=1.0), run(windowed(model, schedule=schedule), noise, cfg=1.0)) > 1e-4
    windows = spy.model_options["context_handler"].windows
    total = LATENTS + windows.spec.padding_frames(LATENTS)
    places = [given["options"][PLACE_KEY] for given in seen]
    planned = windows.at(total, 0)
    expected = [windows.overview(total)] * 2 + planned if schedule == "coarse" else planned * STEPS
    assert [list(place.frames) for place in places] == expected
    assert {place.total for place in places} == {total}


@pytest.mark.parametrize("first", ["windows", "inversion"])
def test_inverted_noise_is_not_shuffled(load_tiny, first):
    """Refused whichever node comes first; without shuffling it is sampled."""
    model, video = load_tiny("5B"), {"samples": noise_of(4)}
    positive, _ = conditionings(model)
    trajectory = adapter.invert(model, positive, video, 2)
    noise = InvertedNoise(trajectory).generate_noise(video)

    def both(kind: str, schedule: str = "static") -> Any:
        if first == "windows":
            return adapter.with_reference_video(windowed(model, noise=kind, schedule=schedule), trajectory, False)
        return windowed(adapter.with_reference_video(model, trajectory, False), noise=kind, schedule=schedule)

    for kind in ("freenoise", "repeated"):
        with pytest.raises(SpecError, match="the inverted noise belongs to its own frames"):
            run(both(kind), noise)
    with pytest.raises(SpecError, match="schedule coarse: expected static"):
        run(both("independent", "coarse"), noise)
    assert torch.isfinite(run(both("independent"), noise)).all()


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_a_video_that_is_there_is_not_laid_out_anew(load_tiny, variant):
    """Below full noise the motion is that of the video. A second stage goes on with the layout of the first."""
    model, video = load_tiny(variant), noise_of(4)
    coarse, static = (windowed(model, schedule=schedule) for schedule in ("coarse", "static"))
    prompts, sigmas = conditionings(model), adapter.make_sigmas(model, 4, "trailing")

    def sampled(patched: Any, noise: Tensor, latent: Tensor, part: Tensor) -> Tensor:
        return comfy.sample.sample_custom(patched, noise, 6.0, adapter.sampler_object("euler"), part, *prompts, latent,
                                          seed=3, disable_pbar=True)

    noise, nothing = noise_of(1), torch.zeros_like(video)
    assert torch.equal(sampled(coarse, noise, video, sigmas[1:]), sampled(static, noise, video, sigmas[1:]))
    for given in ((noise, video, sigmas), (noise, nothing, sigmas[1:]), (nothing, video, sigmas[1:])):
        assert not torch.equal(sampled(coarse, *given), sampled(static, *given))


def test_a_window_of_any_frames_is_cores():
    """Whether its frames lie side by side or not. What it takes is a copy."""
    video = noise_of(1)
    for frames in ([3, 4, 5], [0], [0, 4, 8, 12], [11, 12, 0, 1], [5, 4, 3]):
        ours, cores = (kind(frames, dim=2, total_frames=LATENTS) for kind in (Window, IndexListContextWindow))
        for settings in ({}, {"retain_index_list": [0]}, {"dim": 3} if max(frames) < video.size(3) else {}):
            part = ours.get_tensor(video, **settings)
            assert torch.equal(part, cores.get_tensor(video, **settings))
            part.zero_()
        assert torch.equal(video, noise_of(1))
        sums = [window.add_window(video.clone(), noise_of(2, len(frames))) for window in (ours, cores)]
        assert torch.equal(*sums)


@pytest.mark.parametrize("schedule", ["static", "coarse"])
def test_a_run_has_its_own_numbers(load_tiny, schedule):
    """The video's last window fades out on its left alone, the same frames of a longer one on both sides. The frames
    between those that lay it out are others."""
    settings = {"overlap": 4, "fuse": "linear", "schedule": schedule}
    model, short, long = windowed(load_tiny("5B"), **settings), noise_of(1, 9), noise_of(1, 13)
    expected = run(windowed(load_tiny("5B"), **settings), long)
    run(model, short)
    assert torch.equal(run(model, long), expected)


def test_no_warning_of_length_in_windows(load_tiny, caplog):
    model = load_tiny("5B")
    model.model.spec = replace(model.model.spec, max_frames=17)
    run(windowed(model), noise_of(1))
    assert "was trained on" not in caplog.text
    run(model, noise_of(1))
    assert "was trained on" in caplog.text


@pytest.mark.parametrize("length, words", [
    (33, "windows of 33 frames: CogVideoX 5B was trained on 17 frames."),
    (9, "windows of 9 frames: CogVideoX 5B was trained on 17 frames."), (17, "")])
def test_a_length_that_the_model_was_not_trained_on_is_named(load_tiny, caplog, length, words):
    model = load_tiny("5B")
    network = replace(model.model.spec.transformer, sample_frames=17)
    model.model.spec = replace(model.model.spec, max_frames=17, transformer=network)
    patched = windowed(model, length=length)
    assert words in caplog.text if words else "was trained on" not in caplog.text
    run(patched, noise_of(1, 13))
    assert ("and gets poorer beyond" in caplog.text) == (length > 17)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as the machine has that the project's figures are measured on."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.mark.alone
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_overhead(schedule, monkeypatch):
    """The demo model at its size, four times its length: what windows cost beside their forwards.

    Time of this thread: torch's other threads spin for a while after each forward, which is not what windows cost.
    """
    model = load.load_model(str(demo_pipeline.DEMO / demo_pipeline.MAIN / "transformer"))
    model = with_context_windows(model, windows_of(model, schedule=schedule, noise="freenoise"))
    spent = {"windows": 0.0, "batches": 0.0, "forwards": 0.0}

    def timed(name: str) -> Callable[..., Any]:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return executor(*args, **kwargs)
            finally:
                spent[name] += time.thread_time() - begin
        return wrapper

    for kind, name in ((WrappersMP.CALC_COND_BATCH, "batches"), (WrappersMP.APPLY_MODEL, "forwards")):
        model.add_wrapper_with_key(kind, "test", timed(name))
    all_windows = timed("windows")
    execute = WindowHandler.execute
    monkeypatch.setattr(WindowHandler, "execute", lambda *args: all_windows(execute, *args))
    texts = torch.randn(2, 1, 32, 4096, generator=torch.Generator().manual_seed(5))
    width = model.model.spec.transformer.text_embed_dim
    positive, negative = ([[text[..., :width], {}]] for text in texts)
    sigmas = adapter.make_sigmas(model, STEPS, "trailing")
    shares = [1.0]
    while min(shares) > 0.02 and len(shares) <= 10:  # the least of some rounds: what else runs only adds
        spent.update(dict.fromkeys(spent, 0.0))
        comfy.sample.sample_custom(model, noise_of(1, 17), 2.0, adapter.sampler_object("cogvideox_ddim"), sigmas,
                                   positive, negative, torch.zeros(1, 16, 17, 8, 12), seed=3, disable_pbar=True)
        shares.append((spent["windows"] - spent["batches"]) / spent["forwards"])
    assert min(shares) <= 0.02, shares


@pytest.mark.parametrize("host", ["server", "oldest_server"])
@pytest.mark.parametrize("variant", ["5B", "1.5-5B-I2V"])
def test_on_a_server(request, saved_latent, error, host, variant):
    """Both nodes in a graph, with core's KSampler; batch 2, which core's node cannot slice."""
    running = request.getfixturevalue(host)
    graph = latent_only(image_to_video(variant) if variant.endswith("I2V") else text_to_video(variant))
    graph["4"]["inputs"].update(length=49, batch_size=2)
    graph = with_core_ksampler(graph, "euler", "simple", steps=2)
    plain = saved_latent(running, running.run(graph))
    made = saved_latent(running, running.run(patched_model(graph, "CogXContextWindows", **SETTINGS)))
    assert made.shape == plain.shape == (2, 16, LATENTS, 8, 12) and torch.isfinite(made).all()
    assert error(made, plain) > 1e-3
    if variant == "5B":
        riflex = saved_latent(running, running.run(patched_model(graph, "CogXRIFLEx", k=0, tuned_frames=0)))
        assert torch.isfinite(riflex).all() and error(riflex, plain) > 1e-4


@pytest.mark.parametrize("host", ["server", "oldest_server"])
def test_equals_core_on_a_server(request, saved_latent, error, host):
    """Of each version; one video, and FreeNoise of the same seed."""
    running = request.getfixturevalue(host)
    graph = latent_only(text_to_video("5B"))
    graph["4"]["inputs"]["length"] = 57  # three windows side by side
    graph = with_core_ksampler(graph, "euler", "simple", steps=2)
    manual = {"context_length": 5, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1,
              "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": True, "cond_retain_index_list": "",
              "split_conds_to_windows": False, "latent_retain_index_list": "", "causal_window_fix": False}
    ours = patched_model(graph, "CogXContextWindows", **{**SETTINGS, "schedule": "static"})
    core = patched_model(graph, "ContextWindowsManual", **manual)
    made, expected, plain = (saved_latent(running, running.run(one)) for one in (ours, core, graph))
    assert torch.equal(made, expected) and error(made, plain) > 1e-3


@pytest.mark.parametrize("variant, inputs, message", [
    ("5B", {"length": 18}, r"length: 18 frames: CogVideoX 1\.0 needs 8N\+1 .*; nearest: 17 or 25\."),
    ("5B", {"overlap": 17}, r"overlap 17: expected less than length 17; nearest: 16\."),
    ("5B", {"overlap": 3}, r"overlap 3: CogVideoX 1\.0 needs a multiple of 4 frames; nearest: 0 or 4\."),
    ("5B", {"length": 0}, r"length 0: expected 1 to 8193; nearest: 1\."),
    ("1.5-5B", {"length": 25}, r"length: 25 frames: CogVideoX 1\.5 needs 16N\+1 .*; nearest: 17 or 33\."),
    ("5B-I2V", {"length": 25}, r"length 25: 5B-I2V has learned positions for 17 frames only; set length 17\."),
])
def test_bad_input_on_a_server(server, variant, inputs, message):
    graph = latent_only(image_to_video(variant) if variant.endswith("I2V") else text_to_video(variant))
    with pytest.raises(PromptError) as raised:
        server.run(patched_model(graph, "CogXContextWindows", **{**SETTINGS, **inputs}))
    assert re.search(message, f"{raised.value} {raised.value.details}") and server.alive()
