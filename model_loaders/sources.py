"""Which files a component is read from, and whether they have changed since. Pure: neither torch nor ComfyUI.

The one place that says which config files beside the weights count: the loaders read these, and what ComfyUI keeps of
a loader is kept as long as these are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..models.specs import SpecError
from .detect import TEXT_CLASSES, TRANSFORMER_CLASS, VAE_CLASS
from .download import RECORD
from .files import CONFIG, INDEX, component_folder, is_file, is_folder, read_json, weight_set

COMPONENTS = ("transformer", "vae", "text_encoder")
TOKENIZER = "tokenizer.json"


def parts_of(folder: Path) -> dict[str, str]:
    """The folders in ``folder`` that hold a component, such as transformer_I2V, and which component each holds.

    Their config.json says it. Many models have a T5 encoder: one counts beside another part of CogVideoX. In what
    this pack downloaded the names say it.
    """
    names = sorted(next(os.walk(folder), ("", [], []))[1])
    found = {name: part for name in names if (part := _part_by_config(folder / name / CONFIG))}
    if is_file(folder / RECORD):
        return found | {name: name for name in COMPONENTS if name in names}
    return found if set(found.values()) - {"text_encoder"} else {}


def _part_by_config(file: Path) -> str | None:
    try:
        config = read_json(file) if is_file(file) else {}
    except SpecError:
        return None
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(name in TEXT_CLASSES for name in architectures):
        return "text_encoder"
    return {TRANSFORMER_CLASS: "transformer", VAE_CLASS: "vae"}.get(str(config.get("_class_name")))


def config_of(path: Path) -> Path | None:
    """The config.json that belongs to the weights at ``path``, there or not; None if none can."""
    folder = component_folder(path)
    return None if folder is None else folder / CONFIG


def latent_configs(config: Path) -> tuple[Path, Path]:
    """The configs of the VAE and the scheduler in the pipeline of a transformer's ``config``."""
    pipeline = config.parent.parent
    return pipeline / "vae" / CONFIG, pipeline / "scheduler" / "scheduler_config.json"


def tokenizer_folder(text_encoder: Path) -> Path | None:
    """The tokenizer beside a text encoder folder, if it is one that ComfyUI reads."""
    beside = text_encoder.parent / "tokenizer"
    return beside if is_folder(text_encoder) and is_file(beside / TOKENIZER) else None


def transformer_config_beside(text_encoder: Path) -> Path | None:
    """The config of the transformer in the same pipeline as a text encoder folder, if it is there."""
    config = text_encoder.parent / "transformer" / CONFIG
    return config if is_folder(text_encoder) and is_file(config) else None


def files_read(component: str, path: Path) -> list[Path]:
    """Every file that the loader of ``component`` looks into for the folder, file or shard ``path``; some may be
    missing.

    Raises:
        SpecError: as ``weight_set``.
    """
    files, config = weight_set(path), config_of(path)
    if config is not None:
        files.append(config)
        files += latent_configs(config) if component == "transformer" else ()
    if component == "text_encoder":
        beside = transformer_config_beside(path)
        files += [beside] if beside else []
        tokenizer = tokenizer_folder(path)
        files += sorted(tokenizer.iterdir()) if tokenizer else []
    return files


def pipeline_files(folder: Path) -> list[Path]:
    """As ``files_read``, for a whole pipeline folder."""
    return [folder / INDEX, *(file for name in COMPONENTS for file in files_read(name, folder / name))]


def fingerprint(files: Iterable[Path]) -> str:
    """Changes when one of ``files`` is replaced: paths, and of what they lead to the size and times; no content."""
    return ";".join(f"{file},{_state(file)}" for file in files)


def _state(file: Path) -> str:
    try:
        found = os.stat(file)
    except OSError:
        return "missing"
    # A file that is moved to the place of another may have its size and, from an archive, its time; not its time of
    # change (on Windows, of creation). The number of a file tells less: network drives number anew when they like.
    return f"{found.st_size},{found.st_mtime_ns},{found.st_ctime_ns}"


def state_of(component: str, path: Path) -> str:
    """The fingerprint of all that is read for a component; of a whole folder for 'pipeline'."""
    try:
        return fingerprint(pipeline_files(path) if component == "pipeline" else files_read(component, path))
    except (SpecError, OSError) as error:  # loading says it better; once mended it is another fingerprint
        return str(error)
