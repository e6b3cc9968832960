"""Saved latents on disk: to the bit, whole or not at all, the newest kept, nobody else's touched. No ComfyUI."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace

import pytest
import torch
from cogx.model_loaders import latent_files
from cogx.model_loaders.latent_files import (
    FORMAT_KEY,
    METADATA_KEY,
    NAME,
    SavedRun,
    find,
    fingerprint,
    list_files,
    pack_version,
    pixel_size,
    prune,
    read_latent,
    read_run,
    write,
)
from cogx.model_loaders.recovery_settings import RecoverySettings, from_values, read_settings
from cogx.models.specs import SpecError
from safetensors.torch import load_file, save_file


def made(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, SavedRun]:
    latent = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    run = SavedRun(model="1.5-5B", **pixel_size(latent), fps=16, seed=seed, sampler="euler", steps=50, step=50,
                   complete=True, end_sigma=0.0, cfg=6.0, dtype="bfloat16", seconds=61.5, saved="2026-01-02 03:04:05",
                   sha256=fingerprint(latent), version=pack_version())
    return latent, run


def written(folder, seed: int, age: float = 0.0):
    path = write(folder, *made(seed))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comes_back_to_the_bit(tmp_path, dtype):
    latent, run = made(7, dtype)
    path = write(tmp_path / "new" / "folder", latent.to(memory_format=torch.channels_last_3d), run)
    again, its_run = read_latent(path)
    assert again.dtype == dtype and torch.equal(again, latent) and its_run == run == read_run(path)
    assert path.name == "20260102-030405_1.5-5B_seed7.safetensors" and NAME.fullmatch(path.name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left
    assert FORMAT_KEY in load_file(path)  # or ComfyUI's Load Latent would scale it
    assert (run.width, run.height, run.frames) == (48, 32, 9) and run.version.count(".") == 2


def test_what_it_says():
    run = made(7)[1]
    assert run.describe() == ("CogVideoX 1.5-5B, 48x32, 9 frames, 16 fps, seed 7, euler, 50 steps, cfg 6, "
                              "2026-01-02 03:04:05, complete")
    assert replace(run, step=3, complete=False).describe().endswith("not complete: stopped at step 3 of 50")
    assert replace(run, end_sigma=2.5).describe().endswith("a first stage: noise of sigma 2.5 is left in it")


def test_one_second_one_seed_two_files(tmp_path):
    latent, run = made()
    partial = replace(run, complete=False, step=12)
    names = [write(tmp_path, latent, each).name for each in (run, run, run, partial)]
    assert names[1:] == ["20260102-030405-2_1.5-5B_seed0.safetensors", "20260102-030405-3_1.5-5B_seed0.safetensors",
                         "20260102-030405_1.5-5B_seed0_step12.safetensors"]
    assert all(NAME.fullmatch(name) for name in names)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(latent_files.os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, *made())
    assert list(tmp_path.iterdir()) == []


def raising(*errors):
    """A function that raises these in turn, and then does nothing."""
    left = list(errors)

    def run(*_):
        if left:
            raise left.pop(0)

    return run


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_sync_has_the_file(tmp_path, monkeypatch, code):
    monkeypatch.setattr(latent_files.os, "fsync", raising(OSError(code, "not here")))
    assert torch.equal(read_latent(write(tmp_path, *made()))[0], made()[0])


def test_a_file_that_is_open_elsewhere_is_tried_again(tmp_path, monkeypatch):
    replace_file, refuse = os.replace, raising(PermissionError("open"), PermissionError("open"))
    monkeypatch.setattr(latent_files.os, "replace", lambda *paths: (refuse(), replace_file(*paths)))
    assert read_run(write(tmp_path, *made())) == made()[1]
    monkeypatch.setattr(latent_files.os, "replace", raising(*[PermissionError("read-only")] * 99))
    monkeypatch.setattr(latent_files.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError, match="read-only"):
        write(tmp_path, *made())
    assert len(list(tmp_path.iterdir())) == 1


def test_no_error_leaves_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_files.os, "fsync", raising(MemoryError()))
    with pytest.raises(MemoryError):
        write(tmp_path, *made())
    assert list(tmp_path.iterdir()) == []


def test_newest_first_and_found_by_content(tmp_path):
    assert list_files(tmp_path / "missing") == []
    old, new = written(tmp_path, 2, 50), written(tmp_path, 1, 5)
    (tmp_path / "foreign.safetensors").write_bytes(b"not a latent")
    (tmp_path / ".hidden.safetensors").write_bytes(b"")
    assert list_files(tmp_path)[1:] == [new, old]
    assert find(tmp_path, fingerprint(made(2)[0])) == old
    assert find(tmp_path, fingerprint(made(3)[0])) is None
    assert fingerprint(made(2)[0]) != fingerprint(made(2)[0].reshape(1, 16, 3, 6, 4))


def test_pruning_deletes_only_our_own(tmp_path):
    ours = [written(tmp_path, seed, age=100 * seed) for seed in range(4)]
    renamed = ours[3].rename(tmp_path / "my best one.safetensors")
    same_name = tmp_path / "20200101-000000_5B_seed1.safetensors"
    save_file({"latent_tensor": torch.zeros(1, 16, 1, 2, 2)}, same_name)
    other = tmp_path / "notes.txt"
    other.write_text("keep")
    names = (".20260102-030405_5B_seed0.safetensors.77.tmp", ".20260102-030406_5B_seed0.safetensors.78.tmp", ".my.tmp")
    stale, fresh, foreign = (tmp_path / name for name in names)
    for file in (stale, fresh, foreign):
        file.write_bytes(b"")
    for file in (same_name, other, stale, foreign, renamed):
        os.utime(file, (1e9, 1e9))
    assert sorted(prune(tmp_path, 2)) == sorted([ours[2], stale])
    assert {file.name for file in tmp_path.iterdir()} == {
        file.name for file in (ours[0], ours[1], renamed, same_name, other, fresh, foreign)}


def test_stopped_runs_push_out_no_finished_one(tmp_path):
    latent, run = made()
    finished = [written(tmp_path, seed, age=1000) for seed in range(2)]
    stopped = [write(tmp_path, latent, replace(run, complete=False, step=step)) for step in range(3)]
    for age, path in enumerate(stopped):
        os.utime(path, (time.time() - age,) * 2)
    assert prune(tmp_path, 2) == stopped[2:]
    assert prune(tmp_path, 2, keep_stopped=1) == stopped[1:2]
    assert sorted(list_files(tmp_path)) == sorted([*finished, stopped[0]])


def test_a_negative_seed_has_a_name_of_ours(tmp_path):
    latent, run = made()
    path = write(tmp_path, latent, replace(run, seed=-3))
    assert path.name.endswith("_seed-3.safetensors") and prune(tmp_path, 0) == [path]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = written(tmp_path, 0)
    data = path.read_bytes()
    for broken in (data[:-5], data[:50], b"", b"<html>"):
        path.write_bytes(broken)
        with pytest.raises(SpecError, match=r"is no whole latent file: it is truncated, damaged or not readable"):
            read_run(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SpecError, match="is damaged: its values are not those that were saved"):
        read_latent(path)
    values = json.loads(json.dumps(made()[1].__dict__))
    for tensors, metadata in (
            ({"weight": torch.zeros(1)}, {METADATA_KEY: json.dumps(values)}),
            ({"latent_tensor": torch.zeros(1, 4, 2, 2)}, {METADATA_KEY: json.dumps(values)}),
            ({"latent_tensor": made()[0]}, None),
            ({"latent_tensor": made()[0]}, {METADATA_KEY: "[]"}),
            ({"latent_tensor": made()[0]}, {METADATA_KEY: json.dumps({**values, "seed": "7"})})):
        save_file(tensors, path, metadata)
        with pytest.raises(SpecError, match="expected a latent that CogX saved, got another safetensors file"):
            read_run(path)
    save_file({"latent_tensor": made()[0]}, path, {METADATA_KEY: json.dumps({**values, "added_later": 1})})
    assert read_run(path) == made()[1]


@pytest.mark.parametrize("stored, expected", [
    ({}, RecoverySettings()),
    ({"CogX.Recovery.Enabled": False, "CogX.Recovery.Keep": 2, "CogX.Recovery.MinimumSeconds": 0.5},
     RecoverySettings(False, 2, 0.5)),
    ({"CogX.Recovery.Enabled": "no", "CogX.Recovery.Keep": None, "CogX.Recovery.MinimumSeconds": float("nan")},
     RecoverySettings()),
    ({"CogX.Recovery.Keep": 0, "CogX.Recovery.MinimumSeconds": -1}, RecoverySettings(True, 1, 0.0)),
    ({"CogX.Recovery.Keep": 10 ** 400, "CogX.Recovery.MinimumSeconds": -10 ** 400}, RecoverySettings()),
    ({"CogX.Recovery.Keep": 1e9, "CogX.Recovery.MinimumSeconds": True}, RecoverySettings(True, 100, 60.0)),
])
def test_settings(stored, expected):
    assert from_values(stored) == expected


def test_settings_file(tmp_path, caplog):
    file = tmp_path / "comfy.settings.json"
    assert read_settings(file, {}) == RecoverySettings() and not caplog.records
    file.write_text(json.dumps({"CogX.Recovery.Keep": 9}))
    assert read_settings(file, {"COGX_RECOVERY": "1"}).keep == 9
    assert [read_settings(file, {"COGX_RECOVERY": word}).enabled for word in ("0", "Off", "", "on")] == [
        False, False, True, True]
    for broken in ('{"CogX.Recovery.Keep": 9', "\udcff", "[1]"):
        file.write_bytes(broken.encode("utf-8", "surrogateescape"))
        assert read_settings(file, {}) == RecoverySettings()
    assert len(caplog.records) == 2 and "latents are saved with the default settings" in caplog.text
