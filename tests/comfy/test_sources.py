"""That the loaders open nothing that ``sources.py`` does not know of, and that one locked folder harms no other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cogx.model_loaders import folders, load
from cogx.model_loaders.sources import files_read, pipeline_files
from cogx.models.specs import SpecError
from cogx.nodes.load import LoadModel, LoadPipeline, LoadTextEncoder, LoadVAE

opened: list[str] | None = None  # while it is a list, what Python opens


def note(event: str, arguments: tuple) -> None:
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def hook() -> None:
    sys.addaudithook(note)  # for good: Python cannot take it back


@pytest.fixture()
def seen(hook) -> Iterator[list[str]]:
    global opened
    opened = []
    yield opened
    opened = None


def opened_below(folder: Path, seen: list[str]) -> set[Path]:
    return {Path(name) for name in seen if name.startswith(f"{folder}{os.sep}") and os.path.isfile(name)}


def test_nothing_else_is_opened(tiny_pipelines, seen):
    root = tiny_pipelines / "5B"
    load.load_pipeline(str(root), "fp32")
    found = opened_below(root, seen)
    assert found >= {root / "model_index.json", root / "vae" / "config.json"}, "nothing was noted"
    assert found <= set(pipeline_files(root))
    for component, loader in (("transformer", load.load_model), ("vae", load.load_vae),
                              ("text_encoder", load.load_text_encoder)):
        seen.clear()
        loader(str(root / component), "fp32")
        assert opened_below(root, seen) <= set(files_read(component, root / component))


@pytest.fixture()
def diffusers(tiny_pipelines, tmp_path, monkeypatch) -> Path:
    """A folder of pipelines with one of them, as ComfyUI knows it."""
    (tmp_path / "open").symlink_to(tiny_pipelines / "5B")
    monkeypatch.setattr(folders, "pipeline_roots", lambda: [tmp_path])
    return tmp_path


def test_the_nodes_know_when_something_was_replaced(diffusers, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for file in (diffusers / "open").rglob("*"):
        if file.is_file():
            (copy / file.relative_to(diffusers / "open")).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(diffusers / "open")).write_bytes(file.read_bytes())
    (diffusers / "mine").symlink_to(copy)
    for node, given, file in (
            (LoadPipeline, {"pipeline": "mine"}, "vae/config.json"),
            (LoadModel, {"checkpoint": "mine/transformer"}, "scheduler/scheduler_config.json"),
            (LoadTextEncoder, {"text_encoder": "mine/text_encoder"}, "transformer/config.json"),
            (LoadVAE, {"vae": "mine/vae"}, "vae/config.json")):
        before = node.fingerprint_inputs(**given)
        assert node.fingerprint_inputs(**given) == before
        (copy / file).write_text((copy / file).read_text() + "\n")
        assert node.fingerprint_inputs(**given) != before, node


def test_a_locked_folder(diffusers, monkeypatch):
    """Its names can be read, what they lead to cannot (root may read all, so the system's answer is made here)."""
    locked = diffusers / "locked"
    locked.mkdir()
    (locked / "model_index.json").touch()
    ask = os.stat

    def stat(path, *args, **kwargs):
        if str(path).startswith(f"{locked}{os.sep}"):
            raise PermissionError(13, "Permission denied", str(path))
        return ask(path, *args, **kwargs)

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, stat)
    assert {"locked", "open"} <= set(folders.pipeline_names())
    for component in ("transformer", "vae", "text_encoder"):
        assert f"open/{component}" in folders.component_names(component)
        assert not any(name.startswith("locked/") for name in folders.component_names(component))
    assert folders.pipeline_path("open") == diffusers / "open" and folders.partial_folders() == []
    with pytest.raises(SpecError, match=r"locked cannot be read: Permission denied\. Change its permissions"):
        folders.pipeline_path("locked")
    assert folders.download_root("other") is not None
