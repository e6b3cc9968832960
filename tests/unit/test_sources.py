"""What ComfyUI may keep of a loader: as long as nothing that it reads was replaced, and no longer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cogx.model_loaders.sources import files_read, fingerprint, state_of

SHARDS = [f"transformer/x-0000{i}-of-00002.safetensors" for i in (1, 2)]
READ = [*SHARDS, "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json",
        "vae/v.safetensors", "text_encoder/config.json", "text_encoder/t.safetensors", "tokenizer/tokenizer.json",
        "tokenizer/special_tokens_map.json"]
NOT_READ = ["README.md", "transformer/notes.txt", "vae/deeper/config.json", "assets/preview.png"]


@pytest.fixture()
def pipeline(tmp_path) -> Path:
    """A pipeline whose folders are links to another place, with a link that leads back to itself."""
    for name in [*READ, *NOT_READ]:
        file = tmp_path / "disk" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    index = {"weight_map": {str(i): Path(name).name for i, name in enumerate(SHARDS)}}
    (tmp_path / "disk" / "transformer" / "x.safetensors.index.json").write_text(json.dumps(index))
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for name in os.listdir(tmp_path / "disk"):
        (folder / name).symlink_to(tmp_path / "disk" / name)
    (folder / "loop").symlink_to(folder)
    return folder


def changed_by(component: str, path: Path, pipeline: Path) -> set[str]:
    """The files of ``pipeline`` that, replaced one by one, change what is known of the loader at ``path``."""
    found = set()
    for name in [*READ, *NOT_READ]:
        before = state_of(component, path)
        (pipeline / name).write_text((pipeline / name).read_text() + " ")
        found |= {name} if state_of(component, path) != before else set()
    return found


MODEL = {*SHARDS, "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"}
TEXT = {"text_encoder/config.json", "text_encoder/t.safetensors", "transformer/config.json",
        "tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json"}


@pytest.mark.parametrize("component, name, read", [
    ("pipeline", "", set(READ)), ("transformer", "transformer", MODEL), ("transformer", SHARDS[1], MODEL),
    ("vae", "vae", {"vae/config.json", "vae/v.safetensors"}), ("vae", "vae/v.safetensors", {"vae/config.json",
                                                                                           "vae/v.safetensors"}),
    ("text_encoder", "text_encoder", TEXT),
    ("text_encoder", "text_encoder/t.safetensors", {"text_encoder/config.json", "text_encoder/t.safetensors"}),
])
def test_exactly_what_is_read(pipeline, component, name, read):
    assert changed_by(component, pipeline / name, pipeline) == read


def test_a_file_of_the_same_size_and_time(tmp_path):
    """As an archive unpacks them."""
    old, new = tmp_path / "x.safetensors", tmp_path / "new"
    for file in (old, new):
        file.write_text("{}")
        os.utime(file, (1, 1))
    before = fingerprint([old])
    time.sleep(0.05)  # more than a tick of the file system's clock
    os.replace(new, old)
    assert fingerprint([old]) != before == before


def test_a_drive_that_numbers_its_files_anew(tmp_path, monkeypatch):
    """As network drives do whenever they look again: nothing was replaced, so nothing is loaded or rendered again."""
    file = tmp_path / "x.safetensors"
    file.write_text("{}")
    before, found = fingerprint([file]), os.stat(file)
    fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
    anew = SimpleNamespace(**{**fields, "st_ino": found.st_ino + 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: anew)
        after = fingerprint([file])
    assert after == before


def test_what_is_missing_and_comes_back(pipeline):
    good = state_of("pipeline", pipeline)
    shard = pipeline / SHARDS[0]
    content = shard.read_bytes()
    shard.unlink()
    assert "lacks" in (lacking := state_of("pipeline", pipeline)) != good
    shard.write_bytes(content)
    assert state_of("pipeline", pipeline) not in (lacking, "")
    before = state_of("vae", pipeline / "vae")
    (pipeline / "vae" / "config.json").unlink()
    assert state_of("vae", pipeline / "vae") != before
    assert (pipeline / "vae" / "config.json") in files_read("vae", pipeline / "vae")
