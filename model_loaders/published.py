"""The published CogVideoX pipelines that can be downloaded, and their parts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.specs import SpecError

HUB = "https://huggingface.co"

# The folders of each part; the one that the loaders look for comes last.
PARTS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("scheduler", "transformer"),
    "vae": ("vae",),
    "text_encoder": ("tokenizer", "text_encoder"),
}
CHOICES = ("all", *PARTS)


@dataclass(frozen=True)
class Repository:
    """A published pipeline. ``revision`` is a commit, so that everybody gets the same files; ``sizes`` are GB."""

    repo: str
    revision: str
    licence: str
    sizes: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.repo.split("/")[1]

    @property
    def page(self) -> str:
        return f"{HUB}/{self.repo}"


def _published(name: str, revision: str, licence: str, transformer: float, text_encoder: float) -> Repository:
    sizes = {"transformer": transformer, "vae": 0.9, "text_encoder": text_encoder}
    return Repository(f"zai-org/{name}", revision, licence, sizes)


_OWN = "CogVideoX licence"
# The commits are those that several independent public projects name for these repositories; they were not looked up
# on the hub itself. A commit that the hub does not know is an error that says so, never another file.
REPOSITORIES: Mapping[str, Repository] = {
    "CogVideoX-2b": _published("CogVideoX-2b", "1137dacfc2c9c012bed6a0793f4ecf2ca8e7ba01", "Apache-2.0", 3.4, 9.5),
    "CogVideoX-5b": _published("CogVideoX-5b", "8fc5b281006c82b82d34fd2543d2f0ebb4e7e321", _OWN, 11.1, 9.5),
    "CogVideoX-5b-I2V": _published("CogVideoX-5b-I2V", "a6f0f4858a8395e7429d82493864ce92bf73af11", _OWN, 11.3, 9.5),
    "CogVideoX1.5-5B": _published("CogVideoX1.5-5B", "fdc5267c90b5c06492985b966e43aae984e189e0", _OWN, 11.1, 19.0),
    "CogVideoX1.5-5B-I2V": _published("CogVideoX1.5-5B-I2V", "46c90528707aebbe69066390b4fe7e7d24c9c2a4", _OWN, 11.1,
                                      19.0),
}


def repository(name: str) -> Repository:
    """The published repository ``name``.

    Raises:
        SpecError: there is none of this name.
    """
    for known, found in REPOSITORIES.items():
        if isinstance(name, str) and name.lower() in (known.lower(), found.repo.lower()):
            return found
    raise SpecError(f"{name!r} is not one of the published repositories: expected one of {list(REPOSITORIES)}.")


def folders_of(part: str) -> tuple[str, ...]:
    """The folders of a part; of all parts for 'all'.

    Raises:
        SpecError: no such part.
    """
    if part not in CHOICES:
        raise SpecError(f"part {part!r}: expected one of {list(CHOICES)}.")
    return PARTS[part] if part != "all" else tuple(folder for folders in PARTS.values() for folder in folders)
