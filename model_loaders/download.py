"""Explicit downloads of the published CogVideoX pipelines, or parts of them, from the Hugging Face hub.

A part is fetched into a hidden folder beside its target, checked against the hub's hashes, and then moved to its
place; model_index.json, by which the loaders know a pipeline, comes last. So what is not complete never looks
complete, and a download that was cut off goes on where it stopped.

Pure: no ComfyUI. huggingface_hub lists the files, knows the login and moves the bytes; it is imported only when
something is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..models.specs import SpecError
from .files import INDEX, is_mounted
from .published import HUB, Repository, folders_of, repository

log = logging.getLogger("cogx")

RECORD = ".cogx-download.json"  # in a downloaded folder: from which repository and commit its files are
UNFINISHED = ".cogx-unfinished"  # beside the downloaded folders, or in a linked one: what is not complete yet
SPARE_BYTES = 500_000_000  # left free on the disk
_HASH_CHUNK = 2**24
_SUFFIXES = (".safetensors", ".json", ".model")  # of the files that the loaders read

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the file at work; what it raises stops it


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. ``sha256`` of the content for large files, else ``blob_id``, git's SHA-1."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def folder(self) -> str:
        return self.name.split("/")[0] if "/" in self.name else ""


def free_bytes(folder: Path) -> int:  # where it is or will be
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def is_there(name: str, part: str, root: Path) -> bool:
    """As ``is_complete``, for a published name."""
    return is_complete(root / repository(name).name, part)


def describe(name: str, part: str, root: Path) -> str:
    """What a download would do, from the table alone: nothing is asked of the network."""
    published = repository(name)
    folders_of(part)
    target = root / published.name
    if is_complete(target, part):
        return f"{target} is complete ({part}). There is nothing to download."
    sizes = published.sizes if part == "all" else {part: published.sizes[part]}
    listed = ", ".join(f"{key} {size:g} GB" for key, size in sizes.items())
    there = " What lies there is compared with the hub's list first." if target.exists() else ""
    return (f"{published.repo} ({part}): about {sum(sizes.values()):.1f} GB ({listed})\n"
            f"to {target} ({free_bytes(_staging_of(target)) / 1e9:.1f} GB free).{there}\n"
            f"licence of the weights: {published.licence}, see {published.page}")


# --- What is there already ---


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or damaged: then nothing is known about the folder
        return {}
    valid = isinstance(record, dict) and isinstance(record.get("files"), dict) and isinstance(record.get("commit"), str)
    return record if valid else {}


def _write_record(folder: Path, published: Repository, commit: str, files: Mapping[str, int]) -> None:
    temporary = _part_of(folder / RECORD)
    record = {"repository": published.repo, "commit": commit, "files": dict(files)}
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / RECORD)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def is_complete(target: Path, part: str) -> bool:
    """Whether an earlier download put everything of ``part`` into ``target`` and it still lies there."""
    files: dict[str, int] = _read_record(target).get("files", {})
    for folder in folders_of(part):
        names = [name for name in files if name.startswith(f"{folder}/")]
        if not names or any(_size(target / name) != files[name] for name in names):
            return False
    return part != "all" or (target / INDEX).is_file()


def _missing(target: Path, files: Sequence[HubFile]) -> list[HubFile]:
    """The files of the folders that ``target`` lacks. A folder is there as a whole or not at all.

    Raises:
        SpecError: a folder is there and holds something else.
    """
    missing = []
    for folder in dict.fromkeys(file.folder for file in files):
        own = [file for file in files if file.folder == folder]
        if not (target / folder).exists() or (folder == "" and not (target / INDEX).exists()):
            missing += own
            continue
        wrong = [file.name for file in own if _size(target / file.name) != file.size]
        if wrong:
            raise SpecError(f"{target / folder} is there but is not this download: {wrong[:3]} are missing or of "
                            "another size. Nothing is overwritten: rename or delete that folder and try again.")
    return missing


# --- The hub ---


def _endpoint() -> str:
    # Read at the time of use: huggingface_hub itself reads the variable only once, when it is imported.
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def _check_online(published: Repository) -> None:
    from huggingface_hub import constants

    set_now = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if set_now or constants.HF_HUB_OFFLINE:
        raise SpecError(f"HF_HUB_OFFLINE is set, so {published.repo} cannot be downloaded. Unset it and start again, "
                        f"or copy the folder from elsewhere: {published.page}")


@contextmanager
def _hub_errors(published: Repository, revision: str) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into words."""
    try:
        from huggingface_hub.utils import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ImportError("A download needs huggingface_hub. Install it with the Python that runs ComfyUI: "
                          "pip install -r requirements.txt") from error
    repo, endpoint = published.repo, _endpoint()
    try:
        yield
    except GatedRepoError as error:
        raise SpecError(f"{repo} asks for a login: accept its licence at {published.page}, then run 'hf auth login' "
                        "or set HF_TOKEN, and try again.") from error
    except RepositoryNotFoundError as error:
        raise SpecError(f"{endpoint} has no {repo}, or shows it to other logins only. Check HF_ENDPOINT and your "
                        f"token (hf auth login, HF_TOKEN); its page is {published.page}") from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise SpecError(f"{endpoint} does not have {repo} at commit {revision}. If HF_ENDPOINT names a mirror, unset "
                        "it; else update this pack, or download the folder by hand.") from error
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise SpecError(_stopped(repo, endpoint, error)) from error
        raise SpecError(f"{endpoint} refuses {repo} to you (HTTP {error.response.status_code}). Check your token (hf "
                        f"auth login, HF_TOKEN) and HF_ENDPOINT; its page is {published.page}") from error
    except _connection_errors() as error:
        raise SpecError(_stopped(repo, endpoint, error)) from error


def _connection_errors() -> tuple[type[Exception], ...]:
    """No connection, a broken one, a time-out: the error of the HTTP client (requests or httpx, by version), which is
    the first base of the hub's own; what the disk may raise; and a login page of a network in between is no JSON."""
    from huggingface_hub.utils import HfHubHTTPError

    return (HfHubHTTPError.__bases__[0], OSError, json.JSONDecodeError)


def _stopped(repo: str, endpoint: str, error: BaseException) -> str:
    return (f"The download of {repo} from {endpoint} stopped: {_first_line(error)}. What has come is kept; check the "
            "network and the disk, and try again to go on.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _listing(published: Repository, revision: str, folders: Sequence[str], index: bool) -> tuple[str, list[HubFile]]:
    """The commit behind ``revision``, and the files to take, in the order of ``folders``; model_index.json last.

    Raises:
        SpecError: a folder without files, or another commit than the one asked for.
    """
    from huggingface_hub import HfApi

    info = HfApi(endpoint=_endpoint()).model_info(published.repo, revision=revision, files_metadata=True, timeout=30)
    commit = info.sha or ""
    if re.fullmatch("[0-9a-f]{40}", revision) and commit != revision:
        raise SpecError(f"{_endpoint()} answers with commit {commit or 'unknown'} of {published.repo}, expected "
                        f"{revision}. If HF_ENDPOINT names a mirror, unset it.")
    found = [HubFile(one.rfilename, one.size or 0, one.lfs["sha256"] if one.lfs else None, one.blob_id)
             for one in info.siblings or ()]
    files = [file for folder in folders for file in found if _is_wanted(file.name, folder)]
    lacking = [folder for folder in folders if not any(file.folder == folder for file in files)]
    indexes = [file for file in found if file.name == INDEX] if index else []
    if lacking or len(indexes) != index:
        raise SpecError(f"{published.repo} at {commit} has no {lacking or INDEX}: it is not a pipeline folder. Check "
                        "HF_ENDPOINT.")
    return commit, files + indexes


def _is_wanted(name: str, folder: str) -> bool:
    """Whether ``name`` is a file directly in ``folder`` that the loaders read; never a path that leads elsewhere."""
    return re.fullmatch(rf"{folder}/[\w][\w.-]*", name) is not None and name.endswith(_SUFFIXES)


class _Watched:
    """A file that tells after each write how long it is. What ``tell`` raises stops the download."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], None]) -> None:
        self._file, self._tell = file, tell

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._tell(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass
class _Transfer:
    """One download at work: where the bytes come from, and how far it is."""

    published: Repository
    commit: str
    total: int
    progress: Progress
    done: int = 0  # bytes of finished files

    def fetch(self, file: HubFile, destination: Path) -> None:
        """Writes ``file`` to ``destination``, which appears when it is complete and its hash is right.

        Raises:
            SpecError: what came is damaged.
        """
        destination.parent.mkdir(parents=True, exist_ok=True)
        if _size(destination) != file.size:
            part = _part_of(destination)
            self._receive(file, part)
            self._check(file, part)
            os.replace(part, destination)
        self.done += file.size
        self.progress(self.done, self.total, file.name)

    def _receive(self, file: HubFile, part: Path) -> None:
        """Fills ``part``, again and again as long as each connection brings something."""
        while True:
            if _size(part) > file.size:
                part.unlink()
            with open(part, "ab") as created:
                have = created.tell()
            self.progress(self.done + have, self.total, file.name)
            if have == file.size:
                return
            try:
                return self._request(file, part, have)
            except _connection_errors() as error:
                if _size(part) <= have:
                    raise
                log.info("%s: %s; going on", file.name, _first_line(error))

    def _request(self, file: HubFile, part: Path, have: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.published.repo, file.name, revision=self.commit, endpoint=_endpoint())
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # ranges are of the file itself
        with open(part, "r+b") as raw:
            raw.seek(have)
            watched = _Watched(raw, lambda size: self.progress(self.done + size, self.total, file.name))
            http_get(url, watched, resume_size=have, headers=headers, expected_size=file.size,
                     displayed_filename=file.name)

    def _check(self, file: HubFile, part: Path) -> None:
        size = _size(part)
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(part, "rb") as content:
            while chunk := content.read(_HASH_CHUNK):
                digest.update(chunk)
                self.progress(self.done + file.size, self.total, file.name)  # reading 5 GB takes a while, too
        if size != file.size or digest.hexdigest() != (file.sha256 or file.blob_id):
            part.unlink()
            raise SpecError(f"{file.name} came damaged (its hash is not the hub's). It was removed; try again to "
                            "download it anew. If it comes so again, check the disk and the network.")


def download(name: str, part: str, root: Path, progress: Progress) -> Path:
    """Downloads ``part`` of the published pipeline ``name`` into a folder below ``root``; returns that folder.

    What is complete is not downloaded again, and what was cut off goes on. A folder stays with the commit it began
    with, whatever the table says later.

    Raises:
        SpecError: no such name, offline, no access, no space, not writable, damaged in transfer, or in the way of
            other files. ``progress`` may raise anything to stop; what has come is kept.
    """
    published = repository(name)
    folders = folders_of(part)
    target = root / published.name
    if is_complete(target, part):
        return target
    revision = _read_record(target).get("commit") or published.revision
    with _hub_errors(published, revision):
        _check_online(published)
        commit, files = _listing(published, revision, folders, index=part == "all")
        wanted = _missing(target, files)
        if not wanted:  # somebody put it there without this module
            return target
        staging = _staging(target, published, commit)
        _check_space(wanted, staging)
        transfer = _Transfer(published, commit, sum(file.size for file in wanted), progress)
        for folder in dict.fromkeys(file.folder for file in wanted):
            own = [file for file in wanted if file.folder == folder]
            for file in own:
                transfer.fetch(file, staging / file.name)
            _publish(staging, target, folder, own, published, commit)
        _clean_up(staging)
    return target


def _staging_of(target: Path) -> Path:
    """Where ``target`` is until it is moved to its place: beside it, but within a folder that is on another disk."""
    return (target if target.is_symlink() or is_mounted(target) else target.parent) / UNFINISHED / target.name


def _staging(target: Path, published: Repository, commit: str) -> Path:
    """The folder for what is not complete; emptied if what lies there is of another commit."""
    staging = _staging_of(target)
    if target.is_symlink() and not target.exists():
        raise SpecError(f"{target} leads to {os.readlink(target)}, which is not there. Connect that disk.")
    try:
        if staging.exists() and _read_record(staging).get("commit") != commit:
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
        _write_record(staging, published, commit, {})
    except OSError as error:
        raise SpecError(f"{staging.parent.parent} cannot be written to ({_first_line(error)}). Choose another folder, "
                        "or change its permissions.") from error
    return staging


def _clean_up(staging: Path) -> None:
    """Removes what is empty; what was begun of another part stays."""
    for folder in (folder for folder in staging.iterdir() if folder.is_dir() and not any(folder.iterdir())):
        folder.rmdir()
    if [file.name for file in staging.iterdir()] == [RECORD]:
        shutil.rmtree(staging)
        if not any(staging.parent.iterdir()):
            staging.parent.rmdir()


def _part_of(path: Path) -> Path:
    """Where ``path`` is while it is not complete."""
    return path.with_name(f"{path.name}.part")


def _check_space(wanted: Sequence[HubFile], staging: Path) -> None:
    needed = SPARE_BYTES
    for file in wanted:
        path = staging / file.name
        needed += max(file.size - max(_size(path), _size(_part_of(path)), 0), 0)
    free = free_bytes(staging)
    if free < needed:
        raise SpecError(f"{staging.parent.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free. Free "
                        f"{(needed - free) / 1e9:.1f} GB, choose a single part, or another folder.")


def _publish(staging: Path, target: Path, folder: str, files: Sequence[HubFile], published: Repository,
             commit: str) -> None:
    """Moves a complete folder (or, for '', the index file) to its place, and says in the record whose it is."""
    target.mkdir(parents=True, exist_ok=True)
    known: dict[str, int] = _read_record(target).get("files", {})
    _write_record(target, published, commit, {**known, **{file.name: file.size for file in files}})
    for name in [folder] if folder else [file.name for file in files]:
        os.replace(staging / name, target / name)
