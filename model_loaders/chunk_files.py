"""Finished chunks of a video that is being extended, as files: queued again, a run goes on where it was stopped.

A chunk is found by a hash of what it was sampled from: models, settings, prompts, the nodes that made the video. The
frames that it took over are kept beside it and compared, because a GPU need not give the same bits twice. So nothing
stale is taken, and what did not change is not sampled again: more chunks at the end, or another last prompt.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..models.specs import SpecError
from .latent_files import SavedRun, fingerprint, left_behind, list_files, pack_version, pixel_size, read_latent, write
from .recovery import current_settings, recovery_folder

log = logging.getLogger("cogx")

FOLDER = "extend"  # below the recovery folder, whose own files are counted apart
MOST_BYTES = 2e9  # of all chunks together; the oldest go first, but none of the run that saves
TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.safetensors\.\d+\.tmp")
BEGUN_FROM = "begun_from"  # in the file: the latents that the chunk took over
SAME = 0.01  # relative difference (L2) of these that is numerical noise, and cannot be seen (40 dB)


class NotComparable(Exception):
    """A value that cannot be told apart from others of its kind."""


def digest(value: Any) -> str:
    """SHA-256 of plain values, tensors, weight patches, and containers of them.

    Raises:
        NotComparable: it holds something else.
    """
    sha = hashlib.sha256()
    for part in _words(value):
        sha.update(part.encode() + b"\0")
    return sha.hexdigest()


def _words(value: Any) -> Iterator[str]:
    if value is None or isinstance(value, (bool, int, float, str)):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, Tensor):
        yield fingerprint(value)
    elif isinstance(value, WeightAdapterBase):
        yield type(value).__name__
        yield from _words(value.weights)
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}"
        for key in sorted(value, key=repr):
            yield from _words(key)
            yield from _words(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}"
        for each in value:
            yield from _words(each)
    else:
        raise NotComparable(type(value).__name__)


def _ancestry(prompt: Mapping[str, Any], node_id: str, seen: dict[str, Any]) -> str:
    """What a node of an API prompt and all before it are: their classes and inputs, whatever their ids.

    Raises:
        NotComparable: there is no such node, as in a graph that a node made.
    """
    if node_id not in seen:
        if node_id not in prompt:
            raise NotComparable(f"node {node_id}")
        node = prompt[node_id]
        inputs = {name: _input(prompt, value, seen) for name, value in node["inputs"].items()}
        seen[node_id] = digest([node["class_type"], inputs])
    return seen[node_id]


def _input(prompt: Mapping[str, Any], value: Any, seen: dict[str, Any]) -> Any:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
        return ["link", _ancestry(prompt, value[0], seen), value[1]]
    return value


def _files(path: Path) -> list[Any]:
    """Names, sizes and times of a file, or of all in a folder."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in found if file.is_file()]


def run_identity(model: Any, prompt: Mapping[str, Any] | None, node_id: str | None) -> str | None:
    """What a run of the node ``node_id`` of ``prompt`` works with: the nodes that made its MODEL, VAE and images, and
    of the MODEL the files and the weight patches.

    None, with a line in the log, if that cannot be known.
    """
    try:
        if prompt is None or node_id not in prompt:
            raise NotComparable("a node outside the prompt")
        seen: dict[str, Any] = {}
        nodes = [_input(prompt, prompt[node_id]["inputs"][name], seen) for name in ("model", "vae", "images")]
        loader = model.cached_patcher_init[1]
        return digest([nodes, list(loader), _files(Path(loader[0])), dict(model.patches)])
    except (NotComparable, OSError) as error:
        log.info("Finished chunks are not found again: %s cannot be compared.", error)
        return None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one.float() - other.float()).norm() / other.float().norm()) <= SAME


@dataclass
class ChunkFiles:
    """The chunks that one run finds and saves. ``identity``: of the run; without one nothing is found or saved.

    Nothing that goes wrong here stops a run.
    """

    identity: str | None
    used: set[Path] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return recovery_folder() / FOLDER

    def key(self, inputs: Any) -> str | None:
        """The name of a chunk that is sampled from ``inputs``; None if it has none."""
        if self.identity is None or not current_settings().enabled:
            return None
        try:
            return digest([pack_version(), self.identity, inputs])
        except NotComparable as error:
            log.info("This chunk is not saved: a condition holds %s, which cannot be compared.", error)
            return None

    def find(self, key: str | None, begun_from: Tensor) -> Tensor | None:
        """The sampled latent of a key, to the bit, if it took over these latents."""
        if key is None or not self._path(key).is_file():
            return None
        try:
            latent, run = read_latent(self._path(key))
            kept = safetensors.torch.load(self._path(key).read_bytes()).get(BEGUN_FROM)
            os.utime(self._path(key))
        except (SpecError, OSError) as error:
            log.warning("A finished chunk is sampled again: %s", error)
            return None
        if kept is None or not _alike(kept, begun_from.cpu()):
            log.info("A chunk is sampled again: the frames before it have changed.")
            return None
        self.used.add(self._path(key))
        log.info("Found the finished chunk of %s (seed %d).", run.saved, run.seed)
        return latent

    def save(self, key: str | None, latent: Tensor, begun_from: Tensor, **facts: Any) -> None:
        """facts: the fields of ``SavedRun`` that the latent does not tell."""
        if key is None:
            return
        run = SavedRun(**facts, **pixel_size(latent), step=facts["steps"], complete=True, end_sigma=0.0,
                       saved=time.strftime("%Y-%m-%d %H:%M:%S"), sha256=fingerprint(latent), version=pack_version())
        try:
            write(self.folder, latent, run, self._path(key), {BEGUN_FROM: begun_from.cpu().contiguous()})
            self.used.add(self._path(key))
            self._prune()
        except OSError as error:
            log.warning("The finished chunk could not be saved in %s: %s", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _prune(self) -> None:
        """Delete the oldest beyond ``MOST_BYTES``, none of this run; and what a process left that died while it wrote.
        """
        for path in left_behind(self.folder, TEMPORARY):
            path.unlink(missing_ok=True)
        total = 0
        for path in list_files(self.folder):
            total += path.stat().st_size
            if total > MOST_BYTES and path not in self.used and len(path.stem) == hashlib.sha256().digest_size * 2:
                path.unlink(missing_ok=True)
