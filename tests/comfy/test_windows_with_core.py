"""Context windows together with what else works on a MODEL. Windows side by side, which blend nothing, are the same as
their parts of the video sampled alone; so each case has its reference. In process, tiny networks."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from cogx.model_loaders import load
from cogx.samplers import adapter
from cogx.tests.comfy.test_context_windows import noise_of, run, spied, windowed
from cogx.tests.comfy.test_image_model import conditionings
from cogx.tests.comfy.test_ladder import before_each_forward, rungs, with_limit  # noqa: F401 - fixture
from comfy_extras.nodes_custom_sampler import (
    DualCFGGuider,
    Noise_EmptyNoise,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
    SplitSigmas,
)
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from torch import Tensor

SIDE_BY_SIDE = {"length": 17, "overlap": 0, "schedule": "batched"}
STEPS = 12


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def load_tiny(tiny_pipelines) -> Callable[[str], Any]:
    return lambda variant: load.load_model(str(tiny_pipelines / variant / "transformer"))


def parts_of(video: Tensor) -> list[Tensor]:
    return list(video.split(5, dim=2))


def guided(guider: Any, noise: Tensor, steps: int = STEPS, sigmas: Tensor | None = None, sampler: str = "euler",
           latent: Tensor | None = None) -> Tensor:
    if sigmas is None:
        sigmas = adapter.make_sigmas(guider.model_patcher, steps, "trailing")
    latent = torch.zeros_like(noise) if latent is None else latent
    return guider.sample(noise.clone(), latent, adapter.sampler_object(sampler), sigmas, disable_pbar=True, seed=3)


def cfg_guider(model: Any, positive: Any = None) -> Any:
    prompts = conditionings(model)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or prompts[0], prompts[1])
    guider.set_cfg(6.0)
    return guider


def test_easycache_goes_by_window(load_tiny, error, caplog):
    """What it skips in a window is what it would skip in that part alone."""
    caplog.set_level(logging.INFO)

    def cached(model: Any) -> Any:
        return EasyCacheNode.execute(model, 0.5, 0.0, 0.95, False).args[0]

    model, noise = load_tiny("5B"), noise_of(1, 10)
    expected = torch.cat([guided(cfg_guider(cached(model)), part) for part in parts_of(noise)], dim=2)
    patched = cached(windowed(model, **SIDE_BY_SIDE))
    caplog.clear()
    made = guided(cfg_guider(patched), noise)
    assert error(made, expected) <= 1e-5
    assert torch.equal(guided(cfg_guider(patched), noise), made), "something is left of the first run"
    assert error(guided(cfg_guider(model), parts_of(noise)[0]), expected[:, :, :5]) > 1e-5, "nothing was skipped"
    assert "skipped 0/" not in caplog.text and "EasyCache - skipped" in caplog.text
    caplog.clear()
    moving, plain = (wrap(windowed(model, schedule="uniform")) for wrap in (cached, lambda model: model))
    assert torch.equal(guided(cfg_guider(moving), noise), guided(cfg_guider(plain), noise))
    assert caplog.text.count("EasyCache skips nothing, as uniform windows see other frames at each step.") == 1
    lazy = LazyCacheNode.execute(windowed(model), 0.5, 0.0, 0.95, False).args[0]
    assert torch.isfinite(guided(cfg_guider(lazy), noise)).all()


def test_easycache_takes_what_lays_a_video_out_for_a_window(load_tiny, caplog):
    caplog.set_level(logging.INFO)
    patched = windowed(load_tiny("5B"), schedule="coarse")
    model, seen = spied(EasyCacheNode.execute(patched, 0.5, 0.0, 0.95, False).args[0])
    guided(cfg_guider(model), noise_of(1, 10))
    caches: dict[tuple[int, ...], list[Any]] = defaultdict(list)
    for given in seen:
        caches[tuple(given["options"]["context_window"].index_list)].append(given["options"]["easycache"])
    assert all(own.count(own[0]) == len(own) for own in caches.values())
    laying_out, *drawing = (own[0] for own in caches.values())
    assert len({id(own) for own in (laying_out, *drawing)}) == 1 + len(drawing)
    skipped = laying_out.total_steps_skipped + min(own.total_steps_skipped for own in drawing)
    assert min(laying_out.total_steps_skipped, skipped - laying_out.total_steps_skipped) > 0
    assert re.findall(r"skipped (\d+)/12", caplog.text) == [str(skipped)]


def test_areas_in_time(load_tiny, error):
    """'Set Area with Percentage for Video': frames 3 to 12 of 15, of which each window has another part, and the wrap
    of a closed loop two."""
    model, noise = load_tiny("5B"), noise_of(1, 15)
    plain, other = conditionings(model)

    def positive(first: int, count: int) -> Any:
        area = (count, 8, 6, first, 0, 6)
        return plain + ([[other[0][0], {"area": area, "strength": 1.0}]] if count else [])

    made = guided(cfg_guider(windowed(model, **SIDE_BY_SIDE), positive(3, 6)), noise, 3)
    for part, place, area in zip(parts_of(noise), range(0, 15, 5), ((3, 2), (0, 4), (0, 0)), strict=True):
        expected = guided(cfg_guider(model, positive(*area)), part, 3)
        assert error(made[:, :, place:place + 5], expected) <= 1e-5
    assert torch.isfinite(guided(cfg_guider(windowed(model, schedule="looped"), positive(3, 6)), noise, 3)).all()


def test_a_guider_of_three_conditions(load_tiny, error):
    model, noise = load_tiny("5B"), noise_of(1, 10, 2)
    first, second = conditionings(model)
    third = [[first[0][0].flip(1), {}]]

    def dual(model: Any) -> Any:
        return DualCFGGuider.execute(model, first, second, third, 4.0, 2.0, "regular").args[0]

    expected = torch.cat([guided(dual(model), part, 3) for part in parts_of(noise)], dim=2)
    assert error(guided(dual(windowed(model, **SIDE_BY_SIDE)), noise, 3), expected) <= 1e-5


def test_sampler_custom_advanced_and_split_sigmas(load_tiny, error):
    """The node is the sampler's function; static windows of two stages are those of one, FreeNoise in the first only.
    Windows that move begin anew."""
    model = load_tiny("5B")
    latent = {"samples": torch.zeros(1, 16, 13, 8, 12)}
    noise = Noise_RandomNoise(7)
    sigmas = adapter.make_sigmas(model, 6, "trailing")
    euler = adapter.sampler_object("euler")

    def node(model: Any, noise: Any, sigmas: Tensor, latent: Any) -> Any:
        return SamplerCustomAdvanced.execute(noise, cfg_guider(model), euler, sigmas, latent).args[0]

    patched = windowed(model, noise="freenoise")
    whole = node(patched, noise, sigmas, latent)["samples"]
    alone = cfg_guider(patched).sample(noise.generate_noise(latent), latent["samples"], euler, sigmas, seed=7,
                                       disable_pbar=True)
    assert torch.equal(whole, alone)
    high, low = SplitSigmas.execute(sigmas, 2).args
    zero = Noise_EmptyNoise()
    first = node(patched, noise, high, latent)
    assert error(node(patched, zero, low, first)["samples"], whole) <= 1e-5
    moving, seen = spied(windowed(model, schedule="uniform"))
    node(moving, zero, low, first)
    planned = moving.model_options["context_handler"].windows
    assert len(seen) == sum(len(planned.at(13, step)) for step in range(4))


def test_substeps_stay_in_their_windows(load_tiny):
    """dpm_2 calls the model between two sigmas too: with the windows of the step that it is in."""
    model, seen = spied(windowed(load_tiny("5B"), schedule="uniform"))
    guided(cfg_guider(model), noise_of(1), 3, sampler="dpm_2")
    planned = model.model_options["context_handler"].windows
    expected = [window for step in (0, 0, 1, 1, 2) for window in planned.at(13, step)]  # none between the last and 0
    assert [given["options"]["context_window"].index_list for given in seen] == expected


def test_out_of_memory_in_a_window(load_tiny, error, rungs):  # noqa: F811
    """The ladder goes down inside a window, once, and the video is the same; the anchor and the batch included."""
    model = windowed(load_tiny("5B-I2V"), schedule="uniform")
    noise, image = noise_of(1, count=2), noise_of(2, 1, 2)
    expected = run(model, noise, image=image)
    rungs()
    assert error(run(with_limit(model, 1)[0], noise, image=image), expected) <= 1e-5
    assert len(rungs()) == 3


def test_compiled(load_tiny, error, monkeypatch):
    """All windows have one shape: nothing is compiled after the first of them."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # Core's attention on the CPU asks for the free memory, and is compiled anew when the answer changes.
    free = comfy.model_management.get_free_memory(None, True)
    monkeypatch.setattr(comfy.model_management, "get_free_memory",
                        lambda dev=None, torch_free_too=False: free if torch_free_too else free[0])
    model, noise = windowed(load_tiny("5B"), schedule="static"), noise_of(1)
    compiled, seen = model.clone(), []
    torch._dynamo.reset()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    count = torch._dynamo.utils.counters["stats"]
    compiled = before_each_forward(compiled, lambda *_: seen.append(count["unique_graphs"]))
    made = guided(cfg_guider(compiled), noise, 1)
    assert error(made, guided(cfg_guider(model), noise, 1)) <= 1e-4
    assert len(seen) > 2 and seen[0] < seen[1] == count["unique_graphs"]


def test_masked_latent_in_windows(load_tiny):
    """What a noise mask leaves out comes back to the bit, the rest is sampled in windows."""
    model, video = windowed(load_tiny("1.5-5B"), schedule="uniform"), noise_of(3)
    mask = torch.zeros(1, 1, 13, 64, 96)
    mask[:, :, 6:] = 1
    guider = cfg_guider(model)
    made = guider.sample(noise_of(1), video, adapter.sampler_object("euler"), adapter.make_sigmas(model, 3, "trailing"),
                         denoise_mask=mask, disable_pbar=True, seed=3)
    assert torch.equal(made[:, :, :6], video[:, :, :6]) and not torch.equal(made[:, :, 6:], video[:, :, 6:])
