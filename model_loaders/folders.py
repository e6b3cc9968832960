"""Where models are: names that users choose, and the paths behind them, through ComfyUI's ``folder_paths``.

HF pipeline folders lie under ``models/diffusers`` or ``models/CogVideo``, single files under ``diffusion_models``,
``text_encoders`` and ``vae``. Names are paths below those folders, with forward slashes. One pipeline comes with the
pack: the embedded demo model.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import folder_paths

from ..models.specs import SpecError
from .files import pipeline_class

PIPELINE_CATEGORY = "diffusers"
LEGACY_FOLDER = "CogVideo"  # where people who used other packs have their pipeline folders
FILE_CATEGORIES = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
EMBEDDED = Path(__file__).resolve().parent.parent / "demo" / "CogX-Demo"  # its name means no other folder
_MAX_DEPTH = 3


def _pipeline_roots() -> list[Path]:
    roots = list(folder_paths.get_folder_paths(PIPELINE_CATEGORY))
    roots += folder_paths.folder_names_and_paths.get(LEGACY_FOLDER, ([],))[0]
    roots.append(os.path.join(folder_paths.models_dir, LEGACY_FOLDER))
    return [Path(root) for root in dict.fromkeys(roots)]


def _folders(name: str) -> list[Path]:
    """The folders ``name`` below the roots. Names cannot leave them: API clients send what they like."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or PurePosixPath(name).is_absolute() or any(p == ".." or ":" in p or "\\" in p for p in parts):
        return []
    roots = [EMBEDDED.parent] if _means_embedded(parts[0]) else _pipeline_roots()
    return [folder for root in roots if _is_folder(folder := root.joinpath(*parts))]


def _means_embedded(first_part: str) -> bool:
    return first_part == EMBEDDED.name and (EMBEDDED / "model_index.json").is_file()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for the file system
        return False


def _pipelines_below(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        relative = os.path.relpath(folder, root)
        if "model_index.json" in files:
            names.append(Path(relative).as_posix())
            subfolders.clear()
        elif relative.count(os.sep) + 1 >= _MAX_DEPTH and relative != ".":
            subfolders.clear()
    return [name for name in names if name != "."]


def _is_cogvideox(folder: Path) -> bool:
    try:
        return pipeline_class(folder).startswith("CogVideoX")
    except SpecError:
        return True  # damaged: listed, so that choosing it says what is wrong


def pipeline_names() -> list[str]:
    """Every CogVideoX pipeline folder (one whose model_index.json says so); last the embedded one."""
    names = {name for root in _pipeline_roots() for name in _pipelines_below(root) if _is_cogvideox(root / name)}
    own = [EMBEDDED.name] if _means_embedded(EMBEDDED.name) else []
    return sorted(name for name in names if not _means_embedded(name.split("/")[0])) + own


def pipeline_path(name: str) -> Path:
    """The folder of a pipeline.

    Raises:
        SpecError: there is none of this name; says where to put it.
    """
    for folder in _folders(name):
        if (folder / "model_index.json").is_file():
            return folder
    places = [str(root) for root in _pipeline_roots()]
    raise SpecError(f"Pipeline folder {str(name)[:80]!r} not found: expected a folder with model_index.json in "
                    f"{places}; found {pipeline_names()}. Put the whole Hugging Face folder there and refresh.")


def component_names(component: str) -> list[str]:
    """Single files of a component, and the component folders of every pipeline ('NAME/transformer')."""
    files = folder_paths.get_filename_list(FILE_CATEGORIES[component])
    folders = [f"{name}/{component}" for name in pipeline_names() if (pipeline_path(name) / component).is_dir()]
    return [name.replace(os.sep, "/") for name in files if name.endswith(".safetensors")] + folders


def component_path(component: str, name: str) -> Path:
    """The file or folder of a component.

    Raises:
        SpecError: there is none of this name; says where to put it.
    """
    category = FILE_CATEGORIES[component]
    full = folder_paths.get_full_path(category, name) if isinstance(name, str) else None
    found = [Path(full)] if full else _folders(name)
    if found:
        return found[0]
    raise SpecError(f"{component} {str(name)[:80]!r} not found: expected a file in "
                    f"{folder_paths.get_folder_paths(category)} or 'PIPELINE/{component}'; found "
                    f"{component_names(component)}. Put the file there and refresh the page.")
