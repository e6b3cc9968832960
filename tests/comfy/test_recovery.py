"""What is saved of a run, and how errors name it. In process; test_recovery_server.py has the rest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import numpy
import pytest
import torch
from cogx.model_loaders import latent_files, recovery
from cogx.model_loaders.latent_files import list_files, read_latent, read_run
from cogx.model_loaders.load import load_model, load_vae
from cogx.model_loaders.recovery import add_words, find_saved, recovery_folder, save_outer_sample, saved_fingerprint
from cogx.models.specs import SpecError
from cogx.samplers import adapter
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP, get_all_wrappers

SHAPE = (1, 16, 5, 8, 12)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's output and user folders of this test alone, with every run saved."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    store({"CogX.Recovery.MinimumSeconds": 0})
    with torch.inference_mode():  # as ComfyUI's executor runs nodes
        yield recovery_folder()


def store(settings: dict[str, Any]) -> None:
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def models(tiny_pipelines: Path) -> dict[str, Any]:
    return {name: load_model(str(tiny_pipelines / name / "transformer")) for name in ("5B", "1.5-5B")}


@pytest.fixture(scope="module")
def vae(tiny_pipelines: Path) -> Any:
    return load_vae(str(tiny_pipelines / "5B" / "vae"))


def random(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model: Any, callback: Any = None, sampler: str = "euler",
           sigmas: torch.Tensor | None = None, latent: torch.Tensor | None = None) -> torch.Tensor:
    prompt = [[random((1, model.model.spec.text_tokens, 32)), {}]]
    sigmas = adapter.make_sigmas(model, 6, "trailing") if sigmas is None else sigmas
    return comfy.sample.sample_custom(model, random(SHAPE, 1), 3.0, adapter.sampler_object(sampler), sigmas, prompt,
                                      prompt, torch.zeros(SHAPE) if latent is None else latent, callback=callback,
                                      disable_pbar=True, seed=41)


@pytest.mark.parametrize("sampler, name", [("cogvideox_dpm", "cogvideox_dpm"), ("dpmpp_2m", "dpmpp_2m")])
@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_what_a_run_returns_is_saved(models, folder, variant, sampler, name):
    sampled = sample(models[variant], sampler=sampler)
    file, = list_files(folder)
    latent, run = read_latent(file)
    assert torch.equal(latent, sampled) and latent.shape == SHAPE  # without 1.5's padding frame
    assert find_saved(sampled) == file and find_saved(sampled + 1) is None
    expected = {"model": variant, "seed": 41, "steps": 6, "step": 6, "complete": True, "sampler": name, "cfg": 3.0,
                "width": 96, "height": 64, "frames": 17, "fps": 8 if variant == "5B" else 16, "end_sigma": 0.0,
                "dtype": "float32"}
    assert {key: getattr(run, key) for key in expected} == expected


def failing_at(step: int, error: BaseException, seen: list[torch.Tensor]) -> Any:
    def callback(i: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        seen.append(x0.clone())
        if i + 1 == step:
            raise error

    return callback


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
@pytest.mark.parametrize("error", [InterruptProcessingException(), torch.cuda.OutOfMemoryError("CUDA out of memory.")],
                         ids=["interrupt", "out of memory"])
def test_a_run_that_stops_leaves_its_estimate(models, folder, variant, error, caplog):
    """The very error goes on; the file holds the denoised video of the last step, unscaled and without padding."""
    seen: list[torch.Tensor] = []
    caplog.set_level("INFO", "cogx")
    with pytest.raises(type(error)) as caught:
        sample(models[variant], failing_at(3, error, seen))
    assert caught.value is error
    file, = list_files(folder)
    latent, run = read_latent(file)
    assert (run.complete, run.step, run.steps) == (False, 3, 6) and file.stem.endswith("_step3")
    assert torch.equal(latent, models[variant].model.process_latent_out(seen[-1])) and latent.shape == SHAPE
    assert f"The video as it was at step 3 of 6 is saved in {file}" in caplog.text
    named = f"at step 3 of 6 is saved in {file}. 'CogVideoX Load Latent' brings it back."
    assert str(error) == "" if isinstance(error, InterruptProcessingException) else named in str(error)
    assert comfy.model_management.is_oom(error) == (not isinstance(error, InterruptProcessingException))


def test_nothing_to_save(models, folder):
    """Short runs, runs with saving off, failures before the first step, inversions, training, no steps at all."""
    model = models["5B"]
    for settings in ({}, {"CogX.Recovery.MinimumSeconds": 0, "CogX.Recovery.Enabled": False}):
        store(settings)
        sample(model)
        with pytest.raises(ValueError, match=r"^stop$"):
            sample(model, failing_at(2, ValueError("stop"), []))
    store({"CogX.Recovery.MinimumSeconds": 0})
    with pytest.raises(SpecError):
        sample(model, sigmas=torch.tensor([1.0, 2.0, 0.5]), sampler="cogvideox_ddim")
    adapter.invert(model, [[random((1, 226, 32)), {}]], {"samples": random(SHAPE)}, 2)
    sample(model, sigmas=torch.arange(3.0))  # numbers of images, in TrainLoraNode
    sample(model, sigmas=torch.zeros(0))
    assert not folder.exists()


def test_a_first_stage_says_that_noise_is_left(models, folder):
    sigmas = adapter.make_sigmas(models["5B"], 6, "trailing")[:4]
    sample(models["5B"], sigmas=sigmas)
    run = read_run(*list_files(folder))
    assert run.end_sigma == pytest.approx(float(sigmas[-1])) and "a first stage: noise" in run.describe()


def test_it_is_outside_all_other_wrappers(models):
    from comfy_extras.nodes_easycache import EasyCacheNode

    model = EasyCacheNode.execute(models["1.5-5B"], 0.2, 0.15, 0.95, False).result[0]
    trajectory = adapter.invert(model, [[random((1, 226, 32)), {}]], {"samples": random(SHAPE)}, 2)
    model = adapter.with_reference_video(model, trajectory, features=False).clone()
    options = {"transformer_options": {"wrappers": model.wrappers}}
    order = get_all_wrappers(WrappersMP.OUTER_SAMPLE, options, is_model_options=True)
    assert len(order) >= 4 and order[0] is save_outer_sample


def test_a_folder_that_cannot_be_written_costs_no_render(models, folder, caplog):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in the place of the folder")
    assert torch.isfinite(sample(models["5B"])).all()
    with pytest.raises(ValueError, match=r"^stop$"):
        sample(models["5B"], failing_at(2, ValueError("stop"), []))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "could not be saved" in caplog.text and "exists" in caplog.text


def test_only_the_newest_are_kept(models, folder):
    store({"CogX.Recovery.MinimumSeconds": 0, "CogX.Recovery.Keep": 2})
    latents = [sample(models["5B"], sigmas=adapter.make_sigmas(models["5B"], steps, "trailing")) for steps in (1, 2, 3)]
    assert [find_saved(latent) is not None for latent in latents] == [False, True, True]
    assert len(list_files(folder)) == 2


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("where", ["current_settings", "_as_between_nodes", "fingerprint", "write", "find",
                                   "list_files"])
def test_no_failure_while_saving_costs_the_render_or_its_error(models, vae, folder, monkeypatch, caplog, where):
    """Whatever it is: no memory, a share that went away. An interrupt stays an interrupt."""
    store({"CogX.Recovery.MinimumSeconds": 0 if where in ("current_settings", "_as_between_nodes", "fingerprint",
                                                          "write") else 60})
    folder.mkdir(parents=True)
    (folder / "other.safetensors").write_bytes(b"")
    monkeypatch.setattr(recovery, where, fail_with(MemoryError("none left")))
    sampled = sample(models["5B"])
    assert torch.isfinite(sampled).all() and "MemoryError: none left" in caplog.text
    with pytest.raises(InterruptProcessingException):
        sample(models["5B"], failing_at(2, InterruptProcessingException(), []))
    with pytest.raises(ValueError, match=r"^stop$"):
        sample(models["5B"], failing_at(2, ValueError("stop"), []))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", fail_with(ValueError("no room")))
    with pytest.raises(ValueError, match="no room"):
        vae.decode(sampled)


def test_a_folder_that_cannot_be_pruned_has_the_file(models, folder, monkeypatch, caplog):
    monkeypatch.setattr(recovery, "prune", fail_with(OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(ValueError, match="is saved in"):
        sample(models["5B"], failing_at(2, ValueError("stop"), []))
    assert len(list_files(folder)) == 1 and "Stale file handle" in caplog.text


def guided(model: Any, guider: Any, prompts: int, seed: Any) -> None:
    prompt = [[random((1, 226, 32)), {}]]
    guider.set_conds(*[prompt] * prompts)
    sigmas = adapter.make_sigmas(model, 2, "trailing")
    guider.sample(random(SHAPE), torch.zeros(SHAPE), adapter.sampler_object("euler"), sigmas, disable_pbar=True,
                  seed=seed)


def test_guidance_and_seed_are_stored_as_numbers_or_not_at_all(models, folder):
    """A tensor as scale, a NumPy seed, a negative one; a guider with two scales, which never reads a third."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    both, one = Guider_DualCFG(models["5B"]), comfy.samplers.CFGGuider(models["5B"])
    both.set_cfg(2.0, 3.0)
    one.set_cfg(torch.tensor(2.5))
    files = []
    for guider, prompts, seed, cfg in ((both, 3, numpy.int64(7), None), (one, 2, -7, 2.5)):
        guided(models["5B"], guider, prompts, seed)
        file, = set(list_files(folder)) - set(files)
        files.append(file)
        assert (read_run(file).cfg, read_run(file).seed) == (cfg, int(seed))


def test_a_second_stage_is_worth_as_much_as_the_first(models, folder):
    """Short as it may be, its result is saved; if it fails before its first estimate, the error names the first."""
    first = sample(models["5B"], sigmas=adapter.make_sigmas(models["5B"], 6, "trailing")[:4])
    file, = list_files(folder)
    store({})

    def second(callback: Any = None, **sampler: Any) -> torch.Tensor:
        return sample(models["5B"], callback, sigmas=adapter.make_sigmas(models["5B"], 6, "trailing")[3:],
                      latent=first, **sampler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models["5B"].model, "apply_model", fail_with(RuntimeError("no room")))
        with pytest.raises(RuntimeError) as caught:
            second()
    assert f"no room The latent that this run began with is saved in {file}. {recovery.BRING_BACK}" in str(caught.value)
    assert list_files(folder) == [file]
    assert find_saved(second()) not in (None, file)


def test_a_full_disk_is_cleared_once(models, folder, monkeypatch, caplog):
    store({"CogX.Recovery.MinimumSeconds": 0, "CogX.Recovery.Keep": 2})
    old, new = (find_saved(sample(models["5B"], sigmas=adapter.make_sigmas(models["5B"], steps, "trailing")))
                for steps in (1, 2))
    os.utime(old, (1e9, 1e9))
    stale = folder / ".20260102-030405_5B_seed0.safetensors.77.tmp"
    stale.write_bytes(b"")
    os.utime(stale, (1e9, 1e9))
    sync = os.fsync

    def full(file: int) -> None:
        if old.exists() or stale.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(latent_files.os, "fsync", full)
    assert find_saved(sample(models["5B"])) is not None and new.exists() and not caplog.records
    monkeypatch.setattr(latent_files.os, "fsync", fail_with(OSError(errno.ENOSPC, "No space left on device")))
    sample(models["5B"])
    assert "No space left" in caplog.text and len(list_files(folder)) == 1


def test_a_linked_name_is_looked_up_each_time(models, folder):
    """ComfyUI asks before it knows the name, and would keep the first answer for ever."""
    from cogx.nodes.recovery import LoadLatent

    assert len({LoadLatent.fingerprint_inputs(None) for _ in range(3)}) == 3
    sample(models["5B"])
    assert saved_fingerprint("newest") == saved_fingerprint("newest") == LoadLatent.fingerprint_inputs("newest")


@pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("method", ["decode", "decode_video", "decode_tiled"])
def test_a_decode_that_fails_names_the_file(models, vae, folder, monkeypatch, method, kind):
    sampled = sample(models["5B"])
    file, = list_files(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise kind("no room")

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", fail)
    words = f"The sampled latent is saved in {file}. 'CogVideoX Load Latent' brings it back."
    with pytest.raises(kind) as caught:
        getattr(vae, method)(sampled)
    assert type(caught.value) is kind and str(caught.value).count(words) == 1 and "no room" in str(caught.value)
    assert comfy.model_management.is_oom(caught.value) == (kind is torch.cuda.OutOfMemoryError)
    with pytest.raises(kind) as other:
        getattr(vae, method)(sampled * 2)
    assert "saved" not in str(other.value)


class OwnWords(Exception):
    def __str__(self) -> str:
        return "mine"


@pytest.mark.parametrize("error, message", [
    (SpecError("tile 5"), "tile 5 It is in x."), (MemoryError(), "It is in x."), (OwnWords("a"), "mine"),
    (OSError(28, "No space"), "[Errno 28] No space"), (RuntimeError("a", "b"), "('a', 'b')"),
])
def test_words_go_into_the_message_where_the_error_lets_them(error, message, caplog):
    before = error.args
    for _ in range(2):
        add_words(error, "It is in x.")
    assert str(error) == message
    assert ("It is in x." in message) != ("It is in x." in caplog.text)
    assert "It is in x." in message or error.args == before
