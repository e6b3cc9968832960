"""Downloads against a small hub on this machine: nothing here reaches the network."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from cogx.model_loaders import download as module
from cogx.model_loaders.download import RECORD, UNFINISHED, describe, download, is_complete
from cogx.model_loaders.published import CHOICES, PARTS, REPOSITORIES, repository
from cogx.models.specs import SpecError
from cogx.tests.hub import Hub

NAME = "CogVideoX-5b"
REPO = REPOSITORIES[NAME]
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
FILES = {  # bytes; what the loaders do not read is not downloaded
    "model_index.json": 300, "README.md": 500, "LICENSE": 100, "scheduler/scheduler_config.json": 400,
    "transformer/config.json": 700, SHARD: 3_000_000,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": 200_000,
    "transformer/diffusion_pytorch_model.safetensors.index.json": 900, "vae/config.json": 300,
    "vae/diffusion_pytorch_model.safetensors": 150_000, "vae/diffusion_pytorch_model.bin": 1000,
    "text_encoder/config.json": 200, "text_encoder/model.safetensors": 400_000, "tokenizer/spiece.model": 120_000,
    "tokenizer/tokenizer_config.json": 50, "transformer/deeper/x.json": 10,
}
NOT_TAKEN = {"README.md", "LICENSE", "vae/diffusion_pytorch_model.bin", "transformer/deeper/x.json"}


class Stop(Exception):
    """What a person's interrupt raises."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    content = random.Random(0)
    for name, size in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.randbytes(size))
    return folder


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Hub({REPO.repo: (REPO.revision, published)}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def quietly(done: int, total: int, file: str) -> None:
    pass


def stop_at(bytes_done: int):
    def progress(done: int, total: int, file: str) -> None:
        if done >= bytes_done:
            raise Stop

    return progress


def taken(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {RECORD}


def same(folder: Path, published: Path, names: set[str]) -> bool:
    return taken(folder) == names and all((folder / name).read_bytes() == (published / name).read_bytes()
                                          for name in names)


def test_the_whole_pipeline(hub, published, tmp_path):
    seen: list[tuple[int, int, str]] = []
    target = download(NAME, "all", tmp_path, lambda *report: seen.append(report))
    assert target == tmp_path / NAME and same(target, published, FILES.keys() - NOT_TAKEN)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]  # nothing unfinished is left
    record = json.loads((target / RECORD).read_text())
    assert record["commit"] == REPO.revision and record["repository"] == REPO.repo
    done, total = [each[0] for each in seen], {each[1] for each in seen}
    assert done == sorted(done) and total == {sum(FILES[name] for name in FILES.keys() - NOT_TAKEN)} == {done[-1]}
    before = len(hub.requests)
    assert download(NAME, "all", tmp_path, quietly) == target
    assert download(REPO.repo, "vae", tmp_path, quietly) == target
    assert len(hub.requests) == before, "what is complete asks the network nothing"
    assert "nothing to download" in describe(NAME, "all", tmp_path)
    (target / SHARD).write_bytes(b"")
    assert not is_complete(target, "all")


@pytest.mark.parametrize("part", list(PARTS))
def test_one_part_and_then_the_rest(hub, published, tmp_path, part):
    target = download(NAME, part, tmp_path, quietly)
    own = {name for name in FILES.keys() - NOT_TAKEN if name.split("/")[0] in PARTS[part]}
    assert same(target, published, own) and not is_complete(target, "all")
    before = hub.served
    download(NAME, "all", tmp_path, quietly)
    assert same(target, published, FILES.keys() - NOT_TAKEN)
    assert hub.served - before == sum(FILES[name] for name in FILES.keys() - NOT_TAKEN - own)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client writes 10 MB at a time: too much for files of this size."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)


def test_a_broken_connection_goes_on_by_itself(hub, published, tmp_path, small_chunks):
    hub.cut_after = 2_000_000
    download(NAME, "transformer", tmp_path, quietly)
    ranges = [wanted for path, wanted in hub.requests if path.endswith(SHARD) and wanted]
    assert ranges and int(ranges[0].removeprefix("bytes=").rstrip("-")) > 0
    assert (tmp_path / NAME / SHARD).read_bytes() == (published / SHARD).read_bytes()


def test_stopped_and_resumed(hub, published, tmp_path, small_chunks):
    """Nothing half is ever below the target's name, and what has come is not served twice."""
    with pytest.raises(Stop):
        download(NAME, "all", tmp_path, stop_at(1_500_000))
    unfinished = tmp_path / UNFINISHED / NAME
    part = unfinished / (SHARD + ".part")
    kept = part.stat().st_size
    assert kept > 1_000_000
    assert not (tmp_path / NAME / "transformer").exists() and not list(tmp_path.rglob("model_index.json"))
    assert not is_complete(tmp_path / NAME, "all")
    hub.requests.clear()
    download(NAME, "all", tmp_path, quietly)
    assert (f"/{REPO.repo}/resolve/{REPO.revision}/{SHARD}", f"bytes={kept}-") in hub.requests
    assert same(tmp_path / NAME, published, FILES.keys() - NOT_TAKEN)


def test_stopped_before_the_end_is_not_a_pipeline(hub, tmp_path):
    """Every part is there, model_index.json is not: the loaders see no pipeline."""
    def progress(done: int, total: int, file: str) -> None:
        if file == "model_index.json":
            raise Stop

    with pytest.raises(Stop):
        download(NAME, "all", tmp_path, progress)
    assert (tmp_path / NAME / "text_encoder").is_dir() and not (tmp_path / NAME / "model_index.json").exists()
    assert not is_complete(tmp_path / NAME, "all")


def test_an_unfinished_part_of_another_commit_is_dropped(hub, published, tmp_path):
    unfinished = tmp_path / UNFINISHED / NAME / "transformer"
    unfinished.mkdir(parents=True)
    (unfinished / (Path(SHARD).name + ".part")).write_bytes(b"old" * 1000)
    (unfinished.parent / RECORD).write_text(json.dumps({"commit": "0" * 40, "files": {}}))
    download(NAME, "transformer", tmp_path, quietly)
    assert not [wanted for path, wanted in hub.requests if wanted]
    assert (tmp_path / NAME / SHARD).read_bytes() == (published / SHARD).read_bytes()


def test_a_folder_stays_with_its_commit(hub, published, tmp_path, monkeypatch):
    download(NAME, "vae", tmp_path, quietly)
    later = module.repository(NAME)
    monkeypatch.setattr(module, "repository", lambda name: SimpleNamespace(
        repo=later.repo, name=later.name, page=later.page, revision="f" * 40))
    download(NAME, "transformer", tmp_path, quietly)
    assert json.loads((tmp_path / NAME / RECORD).read_text())["commit"] == REPO.revision


def test_damaged_in_transfer(hub, published, tmp_path):
    hub.damage = True
    for part, name in (("vae", "vae/config.json"), ("transformer", "scheduler/scheduler_config.json")):
        with pytest.raises(SpecError, match=rf"{name} came damaged .*try again"):
            download(NAME, part, tmp_path, quietly)
    assert not (tmp_path / NAME).exists() and not list(tmp_path.rglob("*.part"))
    hub.damage = False
    (tmp_path / UNFINISHED / NAME / "vae").mkdir(exist_ok=True)
    (tmp_path / UNFINISHED / NAME / "vae" / "diffusion_pytorch_model.safetensors.part").write_bytes(b"x" * 100_000)
    with pytest.raises(SpecError, match=r"vae/diffusion_pytorch_model\.safetensors came damaged"):
        download(NAME, "vae", tmp_path, quietly)
    download(NAME, "vae", tmp_path, quietly)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / NAME / name).read_bytes() == (published / name).read_bytes()


def test_a_folder_that_came_another_way(hub, published, tmp_path):
    """By hf download or a browser: right sizes are taken as they are, wrong ones are not overwritten."""
    shutil.copytree(published, tmp_path / NAME)
    assert "compared with the hub's list" in describe(NAME, "all", tmp_path)
    assert download(NAME, "all", tmp_path, quietly) == tmp_path / NAME and hub.served == 0
    (tmp_path / NAME / SHARD).write_bytes(b"mine")
    with pytest.raises(SpecError, match=r"is there but is not this download.*00001-of-00002.*rename or delete"):
        download(NAME, "all", tmp_path, quietly)
    assert (tmp_path / NAME / SHARD).read_bytes() == b"mine" and hub.served == 0


@pytest.mark.parametrize("how", ["link", "mount or junction"])
def test_a_folder_on_another_disk(hub, published, tmp_path, monkeypatch, how):
    """It is filled on its own disk: nothing can be moved there, and only there is room."""
    models, other = tmp_path / "models", tmp_path / "other"
    for folder in (models, other):
        folder.mkdir()
    target = models / NAME
    if how == "link":
        target.symlink_to(other)
    else:
        other = target
        target.mkdir()
        ask = os.stat
        elsewhere = SimpleNamespace(st_dev=ask(models).st_dev + 1, st_mode=ask(target).st_mode)
        monkeypatch.setattr(module.os, "stat", lambda place, *args, **kwargs: (
            elsewhere if place == target else ask(place, *args, **kwargs)))

    def is_other(place: Path) -> bool:
        return place.resolve().is_relative_to(other.resolve())

    def move(start, end, move=module.os.replace):
        if is_other(Path(start).parent) != is_other(Path(end).parent):
            raise OSError(18, "Invalid cross-device link")
        move(start, end)

    monkeypatch.setattr(module.os, "replace", move)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=2e9 * is_other(Path(place))))
    assert "(2.0 GB free)" in describe(NAME, "vae", models)
    with pytest.raises(Stop):
        download(NAME, "vae", models, stop_at(1))
    assert (other / UNFINISHED).is_dir() and os.listdir(models) == [NAME]
    assert download(NAME, "vae", models, quietly) == target
    assert same(other, published, {name for name in FILES if name.startswith("vae/")} - NOT_TAKEN)


def test_a_link_that_leads_nowhere(hub, tmp_path):
    (tmp_path / NAME).symlink_to(tmp_path / "disk" / "models")
    with pytest.raises(SpecError, match=r"leads to .*models, which is not there\. Connect that disk"):
        download(NAME, "vae", tmp_path, quietly)
    assert not (tmp_path / "disk").exists()


def test_not_enough_space(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=502_000_000))
    with pytest.raises(SpecError, match=r"0\.5 GB are needed and 0\.5 GB free\. Free 0\.0 GB, choose a single part"):
        download(NAME, "all", tmp_path, quietly)
    assert hub.served == 0
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=4_000_000_000))
    download(NAME, "all", tmp_path, quietly)


def test_what_has_come_needs_no_space_again(hub, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        download(NAME, "transformer", tmp_path, stop_at(3_000_000))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=501_000_000))
    download(NAME, "transformer", tmp_path, quietly)


def test_offline(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecError, match=r"HF_HUB_OFFLINE is set, so zai-org/CogVideoX-5b cannot be downloaded\. Unset"):
        download(NAME, "all", tmp_path, quietly)
    assert not hub.requests and NAME in describe(NAME, "all", tmp_path)


@pytest.mark.parametrize("status, code, message", [
    (401, "GatedRepo", r"asks for a login: accept its licence at https://.*hf auth login"),
    (403, "GatedRepo", r"asks for a login"),
    (401, "", r"refuses zai-org/CogVideoX-5b to you \(HTTP 401\)\. Check your token"),
    (404, "RepoNotFound", r"has no zai-org/CogVideoX-5b"),
    (404, "RevisionNotFound", r"does not have zai-org/CogVideoX-5b at commit 8fc5b28.*mirror"),
    (404, "EntryNotFound", r"does not have zai-org/CogVideoX-5b at commit"),
    (503, "", r"stopped: .*503.*try again to go on"),
    (200, "", r"stopped: Expecting value.*try again"),
])
def test_a_hub_that_refuses(hub, tmp_path, status, code, message):
    hub.refuse = (status, code)
    with pytest.raises(SpecError, match=message):
        download(NAME, "all", tmp_path, quietly)
    assert not list(tmp_path.iterdir())


def test_no_connection(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SpecError, match=r"from http://127\.0\.0\.1:9 stopped: .*check the network"):
        download(NAME, "all", tmp_path, quietly)


def test_a_mirror_with_another_commit(hub, published, tmp_path, monkeypatch):
    monkeypatch.setattr("cogx.tests.hub.listing", lambda commit, repo, folder: {
        "id": repo, "sha": "a" * 40, "siblings": []})
    with pytest.raises(SpecError, match=r"answers with commit a+ of zai-org.*expected 8fc5b28.*mirror"):
        download(NAME, "all", tmp_path, quietly)


def test_names_that_lead_elsewhere_are_not_taken(hub, tmp_path, monkeypatch):
    names = ["vae/config.json", "vae/../../evil.json", "/etc/evil.json", "vae/..json/../../evil.json", "vae/.evil.json",
             "vae/a\\evil.json", "vae\n/evil.json", "vae/evil.json\n"]
    assert [name for name in names if module._is_wanted(name, "vae")] == ["vae/config.json"]


def test_a_place_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=r"cannot be written to .*another folder"):
        download(NAME, "all", tmp_path / "file" / "diffusers", quietly)


def test_the_table():
    for name, each in REPOSITORIES.items():
        assert repository(name.upper()) is repository(each.repo) is each and each.name == name
        assert len(each.revision) == 40 and set(each.sizes) == set(PARTS)
    with pytest.raises(SpecError, match=r"'CogVideoX-9b' is not one of .*'CogVideoX-5b'"):
        download("CogVideoX-9b", "all", Path("."), quietly)
    with pytest.raises(SpecError, match=r"part 'unet': expected one of .*'transformer'"):
        download(NAME, "unet", Path("."), quietly)
    assert CHOICES == ("all", "transformer", "vae", "text_encoder")


def test_what_it_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing is asked of it
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: SimpleNamespace(free=30e9))
    text = describe(NAME, "all", tmp_path / "not" / "made")
    assert "about 21.5 GB (transformer 11.1 GB, vae 0.9 GB, text_encoder 9.5 GB)" in text and "30.0 GB free" in text
    assert "CogVideoX licence" in text and "https://huggingface.co/zai-org/CogVideoX-5b" in text
    assert "about 0.9 GB" in describe(NAME, "vae", tmp_path)


def test_the_command(hub, published, tmp_path):
    """scripts/fetch.py in its own process; it needs no ComfyUI and no torch."""
    script = str(Path(__file__).resolve().parents[2] / "scripts" / "fetch.py")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, "--to", str(tmp_path), *arguments], capture_output=True,
                              text=True, timeout=120)

    listed = run()
    assert listed.returncode == 0 and all(name in listed.stdout for name in REPOSITORIES) and not hub.requests
    done = run("cogvideox-5b", "--part", "vae")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(tmp_path / NAME), done.stderr
    assert (tmp_path / NAME / "vae" / "config.json").read_bytes() == (published / "vae/config.json").read_bytes()
    failed = run("nonsense")
    assert failed.returncode == 1 and failed.stderr.startswith("Error: 'nonsense' is not one of")
