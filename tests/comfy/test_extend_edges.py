"""CogXExtend: what it leaves on the disk, and what it refuses before anything is sampled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import folder_paths
import latent_preview
import pytest
import torch
from cogx.model_loaders.chunk_files import ChunkFiles
from cogx.model_loaders.latent_files import list_files
from cogx.model_loaders.recovery import recovery_folder
from cogx.models.specs import SpecError
from cogx.nodes.extend import Extend
from cogx.samplers import adapter
from cogx.samplers.long_video import with_context_windows
from cogx.samplers.windows import LOOPED, Windows
from cogx.tests.comfy.test_extend import FACTS, SAMPLING, TILING, frames_of, pipeline
from cogx.tests.comfy.test_image_model import conditionings
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from torch import Tensor

INPUTS = {"chunks": 2, "length": 17, "overlap": 9, "match_colors": "full", **SAMPLING, **TILING}


class InGraph(Extend):
    """Called without a server, with a graph to tell its runs apart by."""

    hidden = SimpleNamespace(unique_id="1", prompt={
        "1": {"class_type": "CogXExtend", "inputs": {"model": "a", "vae": "b", "images": "c"}}})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's output and user folders of this test alone, with every run saved."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    settings = tmp_path / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"CogX.Recovery.MinimumSeconds": 0}))
    with torch.inference_mode():
        yield recovery_folder()


@pytest.fixture(scope="module")
def parts(tiny_pipelines: Path) -> tuple[Any, Any, Any, Any]:
    """MODEL, VAE, and two prompts."""
    model, vae = pipeline(tiny_pipelines, "5B")
    return model, vae, *conditionings(model)


def extended(parts: tuple[Any, Any, Any, Any], frames: int = 17, **inputs: Any) -> Tensor:
    model, vae, positive, negative = parts
    return InGraph.execute(model, positive, negative, vae, frames_of(frames), **{**INPUTS, **inputs}).args[0]


def test_chunks_push_no_other_render_out(parts, folder, monkeypatch):
    """They are kept once, in a folder of their own; what is stopped is saved as any other run."""
    extended(parts)
    assert len(list_files(folder / "extend")) == 2 and not list_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(InGraph, "hidden", SimpleNamespace(prompt=None, unique_id=None))
        extended(parts)  # cannot be found again, so it is saved as any other run
    assert len(list_files(folder)) == 2

    def interrupted(*_: Any) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(latent_preview, "get_previewer",
                        lambda *_: SimpleNamespace(decode_latent_to_preview_image=interrupted))
    with pytest.raises(RuntimeError, match="stopped"):
        extended(parts, seed=8)
    assert "step1" in list_files(folder)[0].name


@pytest.fixture
def unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "sample", lambda *_, **__: pytest.fail("sampled"))


def test_a_closed_loop_does_not_go_on(parts, unsampled):
    model, *others = parts
    windows = Windows(model.model.spec, 17, 8, LOOPED, "pyramid", "independent", anchor=False, positions="window")
    looped = with_context_windows(model, windows)
    with pytest.raises(SpecError, match=r"samples closed loops .*schedule looped.* MODEL from before Context Windows"):
        extended((looped, *others))
    inputs = {"context_length": 5, "context_overlap": 2, "context_stride": 1, "closed_loop": True, "dim": 2,
              "fuse_method": "pyramid", "freenoise": False, "cond_retain_index_list": [],
              "split_conds_to_windows": False}
    cores = ContextWindowsManualNode.execute(model, context_schedule="looped_uniform", **inputs).args[0]
    with pytest.raises(SpecError, match=r"samples closed loops .*schedule looped_uniform"):
        extended((cores, *others))
    cores = ContextWindowsManualNode.execute(model, context_schedule="standard_static", **inputs).args[0]
    with pytest.raises(pytest.fail.Exception, match="sampled"):
        extended((cores, *others))


@pytest.mark.parametrize("free, remedy", [(25, "Set chunks to 1 or less,"), (24, "Close other programs,")])
def test_a_video_that_has_no_room_is_refused(parts, unsampled, monkeypatch, free, remedy):
    """Linux promises any amount. 17 frames, and two chunks of 8."""
    frame = 64 * 96 * 3 * 4
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: free * frame)
    with pytest.raises(SpecError, match=f"whole video takes 0.0 GB of RAM: .* {remedy} or extend only the last"):
        extended(parts)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 33 * frame)
    with pytest.raises(pytest.fail.Exception, match="sampled"):
        extended(parts)


def test_tiles_from_a_link_are_refused(parts, unsampled):
    with pytest.raises(SpecError, match="tile_overlap 240: expected"):
        extended(parts, tiling="on", tile_overlap=240)


def test_a_new_node_keeps_its_seed():
    """Another seed is another run, which finds no chunk of the one that was stopped."""
    seed = next(item for item in Extend.define_schema().inputs if item.id == "seed")
    assert json.loads(json.dumps(seed.as_dict()))["control_after_generate"] == "fixed"


def test_what_a_killed_run_left_is_deleted(folder):
    """After an hour: before that another process may still write it."""
    chunks = ChunkFiles("run")
    old, new, other = (chunks.folder / name for name in (
        f".{'a' * 64}.safetensors.12.tmp", f".{'b' * 64}.safetensors.12.tmp", ".mine.safetensors.12.tmp"))
    chunks.folder.mkdir(parents=True)
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (1, 1))
    chunks.save(chunks.key(1), torch.zeros(1, 16, 5, 8, 12), torch.zeros(1, 16, 3, 8, 12), **FACTS)
    assert not old.exists() and new.exists() and other.exists() and len(list_files(chunks.folder)) == 1
