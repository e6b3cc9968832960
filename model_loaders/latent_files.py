"""Sampled latents as files: written whole or not at all, found, read back, and the oldest deleted.

Pure: no ComfyUI. A file is what ComfyUI's Save Latent writes, a safetensors file with ``latent_tensor``, and beside it
the settings of the run. Only files with these settings, under a name as made here, are ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..models.specs import VAE_SPATIAL_RATIO, VAE_TEMPORAL_RATIO, SpecError
from .files import read_header

log = logging.getLogger("cogx")

METADATA_KEY = "cogx_recovery"
TENSOR_KEY = "latent_tensor"
FORMAT_KEY = "latent_format_version_0"  # tells ComfyUI's Load Latent that nothing is scaled
NAME = re.compile(r"\d{8}-\d{6}(-\d+)?_[\w.-]+_seed-?\d+(_step\d+)?\.safetensors")
TEMPORARY = re.compile(r"\.\d{8}-\d{6}.*\.safetensors\.\d+\.tmp")
TEMPORARY_SECONDS = 3600  # older ones belong to a process that died while it wrote
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what network and FUSE folders without fsync answer
WAITS = (0.05, 0.2, 0.5, 1.0)  # seconds between attempts to rename

_PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@dataclass(frozen=True)
class SavedRun:
    """What a file says about its latent. ``step`` of ``steps`` is what was done; ``complete`` is false if the run
    was stopped or failed, and the latent then is the estimate of the video at that step."""

    model: str
    width: int
    height: int
    frames: int
    batch: int
    fps: int
    seed: int
    sampler: str
    steps: int
    step: int
    complete: bool
    end_sigma: float  # above 0: the first stage of a split run, with noise left in it
    cfg: float | None
    dtype: str
    seconds: float
    saved: str  # local time, YYYY-MM-DD HH:MM:SS
    sha256: str  # see ``fingerprint``
    version: str

    def describe(self) -> str:
        """One line for people."""
        state = "complete" if self.complete else f"not complete: stopped at step {self.step} of {self.steps}"
        if self.complete and self.end_sigma > 0:
            state = f"a first stage: noise of sigma {self.end_sigma:.3g} is left in it"
        videos = f"{self.batch} videos of " if self.batch > 1 else ""
        guidance = "" if self.cfg is None else f", cfg {self.cfg:g}"
        return (f"CogVideoX {self.model}, {videos}{self.width}x{self.height}, {self.frames} frames, {self.fps} fps, "
                f"seed {self.seed}, {self.sampler}, {self.steps} steps{guidance}, {self.saved}, {state}")


def pixel_size(latent: Tensor) -> dict[str, int]:
    """``width``, ``height``, ``frames`` and ``batch`` of a latent [B, C, T, h, w]."""
    batch, _, frames, height, width = latent.shape
    return {"width": width * VAE_SPATIAL_RATIO, "height": height * VAE_SPATIAL_RATIO,
            "frames": VAE_TEMPORAL_RATIO * (frames - 1) + 1, "batch": batch}


def fingerprint(latent: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    latent = latent.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{latent.dtype} {tuple(latent.shape)}".encode())
    digest.update(latent.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pack_version() -> str:
    """The version in pyproject.toml, which owns it; 'unknown' if somebody left that file out."""
    text = _PYPROJECT.read_text(encoding="utf-8") if _PYPROJECT.is_file() else ""
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # deleted meanwhile
        return 0


def list_files(folder: Path) -> list[Path]:
    """The safetensors files in ``folder``, newest first; none if there is no such folder."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: (_modified(path), path.name), reverse=True)


def _free_path(folder: Path, run: SavedRun) -> Path:
    stamp = re.sub("[-:]", "", run.saved).replace(" ", "-")
    rest = f"_{run.model}_seed{run.seed}{'' if run.complete else f'_step{run.step}'}.safetensors"
    path, number = folder / (stamp + rest), 2
    while path.exists():
        path, number = folder / f"{stamp}-{number}{rest}", number + 1
    return path


def _sync(file: BinaryIO) -> None:
    """Onto the disk, where the folder can do that; elsewhere the file is as safe as that folder makes it."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _rename(temporary: Path, path: Path) -> None:
    """Tried again for a while: on Windows a virus scanner holds new files open for a moment."""
    for seconds in WAITS:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(temporary, path)


def write(folder: Path, latent: Tensor, run: SavedRun, path: Path | None = None,
          beside: Mapping[str, Tensor] = MappingProxyType({})) -> Path:
    """Write a latent; the file appears whole or not at all, also if the machine stops meanwhile.

    path: in the folder; without one a new file gets a name of its run. beside: tensors for the same file.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    path = path or _free_path(folder, run)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    tensors = {TENSOR_KEY: latent.detach().cpu().contiguous(), FORMAT_KEY: torch.tensor([]), **beside}
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, {METADATA_KEY: json.dumps(asdict(run))}))
            _sync(file)
        _rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path


def left_behind(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The temporary files of this name that a process left which died while it wrote."""
    before = time.time() - TEMPORARY_SECONDS
    return [path for path in folder.glob(".*.tmp") if name.fullmatch(path.name) and 0 < _modified(path) / 1e9 < before]


def prune(folder: Path, keep: int, keep_stopped: int | None = None) -> list[Path]:
    """Delete what ``write`` made except the newest ``keep`` files of complete runs and, counted apart so that they push
    out no finished render, ``keep_stopped`` (None: as many) of the others; and what a process left that died in it."""
    files = [path for path in list_files(folder) if NAME.fullmatch(path.name)]
    complete = {path: run.complete for path in files if (run := _run_or_none(path)) is not None}
    finished = [path for path in complete if complete[path]]
    stopped = [path for path in complete if not complete[path]]
    deleted = []
    for path in [*finished[keep:], *stopped[keep if keep_stopped is None else keep_stopped:],
                 *left_behind(folder, TEMPORARY)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # open elsewhere (Windows), or a folder that only adds
            log.warning("The old latent %s could not be deleted: %s", path, error)
        else:
            deleted.append(path)
    return deleted


def _run_or_none(path: Path) -> SavedRun | None:
    try:
        return read_run(path)
    except SpecError:
        return None


def read_run(path: Path) -> SavedRun:
    """What the file says about its latent; reads the header only.

    Raises:
        SpecError: missing, damaged, truncated, or not written by ``write``.
    """
    try:
        tensors, metadata = read_header(path)
    except (SpecError, OSError) as error:
        raise SpecError(f"{path} is no whole latent file: it is truncated, damaged or not readable. Choose "
                        "another.") from error
    foreign = SpecError(f"{path}: expected a latent that CogX saved, got another safetensors file. Choose another, or "
                        "open it with ComfyUI's Load Latent.")
    if TENSOR_KEY not in tensors or len(tensors[TENSOR_KEY].shape) != 5:
        raise foreign
    try:
        values = json.loads(metadata[METADATA_KEY])
        return _run_from(values)
    except (KeyError, TypeError, ValueError):
        raise foreign from None


def _run_from(values: dict[str, Any]) -> SavedRun:
    """Fields that a later version adds are passed over. Raises KeyError, TypeError or ValueError if one is wrong."""
    kinds: dict[str, Any] = {"int": int, "str": str, "bool": bool, "float": (int, float),
                             "float | None": (int, float, type(None))}
    known = {field.name: values[field.name] for field in fields(SavedRun)}
    for field in fields(SavedRun):
        if not isinstance(known[field.name], kinds[str(field.type)]):
            raise ValueError(field.name)
    return SavedRun(**known)


def read_latent(path: Path) -> tuple[Tensor, SavedRun]:
    """The latent [B, C, T, h, w], unscaled, to the bit as it was sampled, and its run.

    Raises:
        SpecError: as ``read_run``; or its values are not those that were written.
    """
    from safetensors.torch import load

    run = read_run(path)
    latent = load(path.read_bytes())[TENSOR_KEY]  # not mapped: an open file cannot be deleted on Windows
    if fingerprint(latent) != run.sha256:
        raise SpecError(f"{path} is damaged: its values are not those that were saved. Choose another.")
    return latent, run


def find(folder: Path, sha256: str) -> Path | None:
    """The newest file that holds the latent of this ``fingerprint``."""
    for path in list_files(folder):
        run = _run_or_none(path)
        if run is not None and run.sha256 == sha256:
            return path
    return None
