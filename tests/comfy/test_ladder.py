"""Running out of memory in sampling: each rung is reached, said once, and the video is the same. In process.

The errors are torch's own, raised at a forward of too many rows, or with too many weights loaded.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import pytest
import torch
from cogx.model_loaders import load
from cogx.models.cogvideox import apply_model as ladder
from cogx.models.cogvideox.image_condition import condition_latent
from cogx.samplers import adapter
from cogx.tests.comfy.graphs import latent_only, patched_model, text_to_video, with_core_ksampler
from cogx.tests.comfy.test_image_model import conditionings, noise_of
from cogx.tests.comfy_server import ComfyServer, PromptError
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_nag import NAGuidance
from torch import Tensor

OOM = torch.OutOfMemoryError
FREE, IN_TURN, ONE_BY_ONE = "free other models", "conditions of guidance in turn", "videos one by one"
VARIANTS = ["5B", "5B-I2V", "1.5-5B-I2V"]
EASY = {"reuse_threshold": 0.5, "start_percent": 0.0, "end_percent": 0.95, "verbose": False}
SAME = 1e-5


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture()
def load_tiny(tiny_pipelines) -> Callable[[str], Any]:
    return lambda variant: load.load_model(str(tiny_pipelines / variant / "transformer"))


@pytest.fixture()
def rungs(caplog) -> Callable[[], list[str]]:
    """What the ladder has said since the last call."""
    caplog.set_level(logging.WARNING, "cogx")

    def said() -> list[str]:
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Out of memory")]
        caplog.clear()
        return lines

    return said


def before_each_forward(model: Any, check: Callable[[Tensor, dict[str, Any]], None]) -> Any:
    """A clone that calls ``check`` with x and transformer_options inside everything else around a forward."""
    model = model.clone()

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        check(args[0], args[5])
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
    return model


def with_limit(model: Any, rows: int, failures: int = 10**6) -> tuple[Any, list[int]]:
    """A clone that runs out of memory at more than ``rows`` rows, ``failures`` times; and the rows of each forward."""
    seen: list[int] = []

    def check(x: Tensor, _: dict[str, Any]) -> None:
        seen.append(x.shape[0])
        if x.shape[0] > rows and sum(n > rows for n in seen) <= failures:
            raise OOM("Tried to allocate 2.00 GiB.\nMore about it.")

    return before_each_forward(model, check), seen


@contextmanager
def block_limit(model: Any, rows: int, after: int = 0) -> Iterator[list[int]]:
    """Out of memory inside the network at more than ``rows`` rows, from forward ``after``; and the rows of each."""
    seen: list[int] = []

    def check(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[0])
        if len(seen) > after and seen[-1] > rows:
            raise OOM("out of memory")

    handle = model.model.diffusion_model.transformer_blocks[1].register_forward_pre_hook(check)
    try:
        yield seen
    finally:
        handle.remove()


def run(model: Any, sampler: str = "cogvideox_ddim", count: int = 2, steps: int = 3, cfg: float = 6.0,
        hooks: Any = None) -> Tensor:
    spec, noise = model.model.spec, noise_of(1, count=count)
    condition = condition_latent(5, noise_of(2, 1, count), None) if spec.takes_image else None
    positive, negative = conditionings(model, condition)
    if hooks is not None:
        positive[0][1]["hooks"] = hooks
    if sampler in adapter.SCHEDULERS:
        sigmas = adapter.make_sigmas(model, steps, "trailing")
        return comfy.sample.sample_custom(model, noise, cfg, adapter.sampler_object(sampler), sigmas, positive,
                                          negative, torch.zeros_like(noise), seed=3, disable_pbar=True)
    return comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", positive, negative,
                               torch.zeros_like(noise), disable_pbar=True, seed=3)


@pytest.mark.parametrize("sampler", ["cogvideox_ddim", "euler"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows, expected", [(2, [FREE, IN_TURN]), (1, [FREE, IN_TURN, ONE_BY_ONE])])
def test_the_same_video_in_parts(load_tiny, rungs, error, variant, sampler, rows, expected):
    """Conditions, image and ofs go with their rows; each rung is said once, and later steps begin at it."""
    model = load_tiny(variant)
    limited, seen = with_limit(model, rows)
    assert error(run(limited, sampler), run(model, sampler)) <= SAME
    assert all(part in line for part, line in zip(expected, rungs(), strict=True))
    assert seen == [4, 4, *([2] if rows == 1 else []), *[rows] * (3 * 4 // rows)]


def test_memory_that_comes_back_changes_nothing(load_tiny, rungs):
    """After one failure the batch goes on whole, and the next run knows nothing of it."""
    model = load_tiny("5B")
    limited, seen = with_limit(model, 2, failures=1)
    assert torch.equal(run(limited), run(model))
    assert len(rungs()) == 1 and seen == [4] * 4
    limited, seen = with_limit(model, 2, failures=2)
    run(limited)
    run(limited)
    assert seen == [4, 4, *[2] * 6, *[4] * 3]
    assert not model.model_options["transformer_options"].get(ladder.LADDER_KEY)


def test_other_models_are_freed_and_this_one_stays(load_tiny, tiny_pipelines):
    model, other = load_tiny("5B"), load.load_vae(str(tiny_pipelines / "5B" / "vae"))
    loaded: list[list[Any]] = []
    watched = before_each_forward(model, lambda *_: loaded.append(
        [m.model.model for m in comfy.model_management.current_loaded_models if m.model is not None]))
    comfy.model_management.load_models_gpu([other.patcher])
    run(with_limit(watched, 2, failures=1)[0], steps=1)
    before, after = loaded[:2]
    assert other.patcher.model in before and other.patcher.model not in after
    assert model.model in before and model.model in after


def with_weights_limit(model: Any, part: float) -> tuple[Any, list[float]]:
    """A clone that runs out of memory while more than this part of its weights is loaded; and the parts at each."""
    seen: list[float] = []

    def check(x: Tensor, _: dict[str, Any]) -> None:
        patcher = model.model.current_patcher
        seen.append(patcher.loaded_size() / patcher.model_size())
        if seen[-1] > part:
            raise OOM("Tried to allocate 2.00 GiB.")

    return before_each_forward(model, check), seen


def test_weights_leave_by_halves(load_tiny, rungs, error):
    """With a LoRA, which then comes on at each use of the weight; the next run has all weights again."""
    model = load_tiny("5B")
    weights = {f"diffusion_model.transformer_blocks.{i}.attn1.to_q.weight": ("diff", (torch.full((64, 64), 0.1),))
               for i in range(2)}
    assert len(model.add_patches(weights)) == 2
    expected = run(model, count=1)
    limited, seen = with_weights_limit(model, 0.3)
    assert error(run(limited, count=1), expected) <= SAME
    lines = rungs()
    assert [re.sub(r"\d[\d.]*", "N", line.split(": ")[1]).split(" of N")[0] for line in lines] == [
        "free other models and the cache, and try again.", "run the conditions of guidance in turn, and try again.",
        "stream N", "stream N"]
    assert seen[-1] <= 0.3 and seen[-1] == seen[-6]
    assert error(run(model, count=1), expected) == 0


def test_weights_leave_under_a_hook(load_tiny, error):
    """A LoRA that belongs to one prompt is on again after its weights were moved, beside one of the whole model."""
    import comfy.hooks

    model = load_tiny("5B")
    assert model.add_patches({"diffusion_model.proj_out.weight": ("diff", (torch.full((64, 64), 0.1),))})
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.transformer_blocks.0.attn1.to_q"
    weights = {f"{name}.lora_{part}.weight": torch.randn(*shape, generator=generator)
               for part, shape in (("up", (64, 4)), ("down", (4, 64)))}
    hooks = comfy.hooks.create_hook_lora(weights, 1.0, 0.0)
    expected, plain = run(model, count=1, hooks=hooks), run(model, count=1)
    assert error(expected, plain) > 1e-3, "the hook did nothing"
    limited, seen = with_weights_limit(model, 0.6)
    assert error(run(limited, count=1, hooks=hooks), expected) <= SAME
    assert seen[0] == 1.0 and seen[-1] <= 0.6


def test_the_end_says_what_was_tried_and_what_would_fit(load_tiny, monkeypatch):
    """Still ComfyUI's kind of error; the sizes named fit by the estimate, and the next larger ones do not."""
    model = load_tiny("1.5-5B")
    limited, seen = with_limit(model, 0)
    patcher, required = type(model), model.model.memory_required
    free = required((1, 16, 4, 8, 12))
    monkeypatch.setattr(patcher, "get_free_memory", lambda self, device: free)
    with pytest.raises(OOM) as caught:
        run(limited, count=1)
    assert comfy.model_management.is_oom(caught.value) and caught.value.__context__ is None
    words = str(caught.value)
    assert words.startswith("Out of memory in sampling 17 frames of 96x64, batch 1. Tried: free other models")
    assert "; stream 0." in words and words.endswith("(Tried to allocate 2.00 GiB.)")
    assert required((1, 16, 6, 8, 12)) > free  # 17 frames, with their padding frame
    width, height = map(int, re.search(r"fit: 17 frames of (\d+)x(\d+)\. ", words).groups())
    assert required((1, 16, 6, height // 8, width // 8)) <= free < required((1, 16, 6, 8, width // 8 + 2))
    assert seen == [1] * (len(words.split("; ")) + 1)  # ComfyUI itself plans with so little: in turn from the first
    monkeypatch.setattr(patcher, "get_free_memory", lambda self, device: 1e12)
    assert run(model, count=1).isfinite().all()


def test_the_end_counts_the_references_of_an_inverted_video(load_tiny, monkeypatch):
    """The network sees two videos for each one of the batch, and the size named fits with both."""
    model = with_features(load_tiny("1.5-5B"), count=1)
    free = model.model.memory_required((2, 16, 4, 8, 8))
    monkeypatch.setattr(type(model), "get_free_memory", lambda *_: free)
    with pytest.raises(OOM) as caught:
        run(with_limit(model, 0)[0], count=1)
    width, height = map(int, re.search(r"fit: 17 frames of (\d+)x(\d+)\. ", str(caught.value)).groups())
    assert model.model.memory_required((2, 16, 6, height // 8, width // 8)) <= free


@pytest.mark.parametrize("kind", [RuntimeError, comfy.model_management.InterruptProcessingException])
def test_no_other_error_is_tried_again(load_tiny, rungs, kind):
    calls = []

    def check(*_: Any) -> None:
        calls.append(1)
        raise kind("something else")

    with pytest.raises(kind, match="something else"):
        run(before_each_forward(load_tiny("5B"), check))
    assert len(calls) == 1 and not rungs()


def test_the_failed_try_leaves_no_tensor(load_tiny):
    """What the network had made is gone when the next try begins."""
    model = load_tiny("5B")
    alive: list[Any] = []
    left: list[int] = []

    def fail(_: Any, args: tuple[Tensor, ...]) -> None:
        left.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(args[0].untyped_storage()))
        if args[0].shape[0] > 1:
            raise OOM("out of memory")

    model.model.diffusion_model.transformer_blocks[1].register_forward_pre_hook(fail)
    run(model, steps=1)
    assert left[:4] == [0, 0, 0, 0] and len(alive) == 7


def test_attention_guidance_keeps_both_conditions_of_a_video_together(load_tiny, rungs, error):
    model = NAGuidance.execute(load_tiny("5B"), 5.0, 0.5, 1.5).args[0]
    limited, seen = with_limit(model, 2)
    assert error(run(limited, cfg=1.0), run(model, cfg=1.0)) <= SAME
    assert seen == [4, 4, *[2] * 6] and ONE_BY_ONE in rungs()[1]
    limited, seen = with_weights_limit(model, 0.6)
    run(limited, count=1, cfg=1.0)
    assert len(rungs()) == 2, "there was something to split"


@pytest.mark.parametrize("rows, after", [(2, 0), (1, 0), (2, 2), (2, 3)])
def test_easycache_skips_the_same_steps(load_tiny, error, caplog, rows, after):
    """Each video by its own cache; that of the first one decides, where they run one by one."""
    caplog.set_level(logging.INFO)
    cached = EasyCacheNode.execute(load_tiny("5B"), **EASY).args[0]
    with block_limit(cached, 4) as whole:
        skipped = run(cached, steps=8)
    assert after < len(whole) < 8
    with block_limit(cached, rows, after) as seen:
        assert error(run(cached, steps=8), skipped) <= SAME
    assert seen[-1] == rows and re.findall(r"skipped (\d+)/8", caplog.text) == [str(8 - len(whole))] * 2


def test_easycache_starts_anew_when_videos_begin_to_run_one_by_one(load_tiny, caplog):
    """What it had was of both videos; it skips again once it knows each of them."""
    caplog.set_level(logging.INFO)
    called: list[int] = []
    cached = EasyCacheNode.execute(load_tiny("5B"), **EASY).args[0]
    cached = before_each_forward(cached, lambda x, _: called.append(x.shape[0]))
    with block_limit(cached, 1, after=2) as seen:
        assert run(cached, steps=12).isfinite().all()
    assert seen[:5] == [4, 4, 4, 4, 2] and set(seen[5:]) == {1}
    assert 8 <= seen.count(1) < called.count(1)
    assert re.findall(r"skipped (\d+)/12", caplog.text) == [str(12 - 2 - seen.count(1) // 4)]


def test_context_windows(load_tiny, error):
    inputs = {"context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
              "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False,
              "cond_retain_index_list": [], "split_conds_to_windows": False}
    model = ContextWindowsManualNode.execute(load_tiny("5B-I2V"), **inputs).args[0]
    assert error(run(with_limit(model, 1)[0], count=1), run(model, count=1)) <= SAME


def test_torch_compile(load_tiny, error):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = load_tiny("5B")
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert error(run(with_limit(compiled, 1)[0], steps=1), run(model, steps=1)) <= 1e-4


def with_features(model: Any, count: int) -> Any:
    trajectory = adapter.invert(model, conditionings(model)[0], {"samples": noise_of(4, count=count)}, 3)
    return adapter.with_reference_video(model, trajectory, features=True)


@pytest.mark.parametrize("rows", [4, 2])
def test_features_of_an_inverted_video(load_tiny, error, rows):
    """The network sees a reference beside each row of the batch, and each video its own."""
    model = with_features(load_tiny("1.5-5B"), count=2)
    expected = run(model)
    with block_limit(model, rows) as seen:
        assert error(run(model), expected) <= SAME
    assert seen[0] == 8 and seen[-1] == rows


LIMIT_NODE = '''
import torch

class CogxTestLimit:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "limit", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "rows": ("INT", {"default": 1, "min": 0})}}

    def limit(self, model, rows):
        def wrapper(executor, x, *args, **kwargs):
            if x.shape[0] > rows:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
            return executor(x, *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key("apply_model", "test", wrapper)
        return (model,)

NODE_CLASS_MAPPINGS = {"CogxTestLimit": CogxTestLimit}
'''


def test_on_the_oldest_server(tiny_pipelines, tmp_path, saved_latent, error):
    """Under core's KSampler: the same latent; at the end of the ladder an error in words, and the server goes on."""
    for folder in ("custom_nodes", "models"):
        (tmp_path / folder).mkdir()
    (tmp_path / "custom_nodes" / "cogx_test_limit.py").write_text(LIMIT_NODE)
    (tmp_path / "models" / "diffusers").symlink_to(tiny_pipelines, target_is_directory=True)
    server = ComfyServer(Path(os.environ["COGX_COMFYUI_OLDEST"]), tmp_path,
                         *([] if torch.cuda.is_available() else ["--cpu"])).start()
    graph = with_core_ksampler(latent_only(text_to_video("5B")), "euler", "simple", steps=2)
    try:
        plain = saved_latent(server, server.run(graph))
        limited = saved_latent(server, server.run(patched_model(graph, "CogxTestLimit", rows=1)))
        assert error(limited, plain) <= SAME
        assert server.log.count("Out of memory in sampling 17 frames of 96x64, batch 1: ") == 2
        with pytest.raises(PromptError, match="this would fit: 9 frames of 96x64") as caught:
            server.run(patched_model(graph, "CogxTestLimit", rows=0))
        assert "OutOfMemoryError" in str(caught.value.details) and "TIPS" in str(caught.value)
        assert server.run(patched_model(graph, "CogxTestLimit", rows=2)).outputs
    finally:
        server.stop()


def test_the_rows_of_a_part():
    """Lists and dicts, as of a ControlNet, go with their rows; what has no row for each stays."""
    batch = ladder.Batch(conditions=2, videos=3, together=False)
    x = torch.arange(6)
    given = {"output": [x, None], "once": torch.zeros(1, 2), "number": torch.tensor(2.0)}
    part = batch.parts(ladder.CONDITIONS)[1]
    rows = ladder._rows_of(given, batch.rows(*part), 6)
    assert rows["output"][0].tolist() == [3, 4, 5] and rows["output"][1] is None
    assert rows["once"].shape == (1, 2) and float(rows["number"]) == 2.0
    names = [uuid.uuid4(), uuid.uuid4()]
    options = {"cond_or_uncond": [1, 0], "uuids": names, "sigmas": torch.tensor([1.0, 2.0, 3.0]), "other": 1}
    assert batch.options_of(*part, options) == {**options, "cond_or_uncond": [0], "uuids": names[1:]}
    parts = [batch.options_of(*p, options) for p in batch.parts(ladder.VIDEOS)]
    assert [(p["cond_or_uncond"], p[ladder.VIDEO_KEY], float(p["sigmas"])) for p in parts] == [
        ([c], v, v + 1.0) for c in (1, 0) for v in range(3)]
    assert len({p["uuids"][0] for p in parts} | set(names)) == 8
    assert [batch.rows(*p) for p in ladder.Batch(2, 3, True).parts(ladder.VIDEOS)] == [[0, 3], [1, 4], [2, 5]]
    assert ladder.Batch(2, 1, True).next_split(ladder.WHOLE) is None
