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
from .download import RECORD, UNFINISHED
from .files import INDEX, is_file, is_folder, pipeline_class

PIPELINE_CATEGORY = "diffusers"
LEGACY_FOLDER = "CogVideo"  # where people who used other packs have their pipeline folders
FILE_CATEGORIES = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
EMBEDDED = Path(__file__).resolve().parent.parent / "demo" / "CogX-Demo"  # its name means no other folder
# Of what is listed; what it is, its bytes say.
EXTENSIONS = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".ckpt", ".bin")
_MAX_DEPTH = 3


def pipeline_roots() -> list[Path]:
    """Where pipeline folders lie."""
    roots = list(folder_paths.get_folder_paths(PIPELINE_CATEGORY))
    roots += folder_paths.folder_names_and_paths.get(LEGACY_FOLDER, ([],))[0]
    roots.append(os.path.join(folder_paths.models_dir, LEGACY_FOLDER))
    return [Path(root) for root in dict.fromkeys(roots)]


def _folders(name: str) -> list[Path]:
    """The folders ``name`` below the roots. Names cannot leave them: API clients send what they like."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or PurePosixPath(name).is_absolute() or any(p == ".." or ":" in p or "\\" in p for p in parts):
        return []
    roots = [EMBEDDED.parent] if _means_embedded(parts[0]) else pipeline_roots()
    return [folder for root in roots if is_folder(folder := root.joinpath(*parts))]


def _means_embedded(first_part: str) -> bool:
    return first_part == EMBEDDED.name and is_file(EMBEDDED / INDEX)


def _folders_below(root: Path, mark: str = INDEX) -> list[str]:
    """The folders that hold the file ``mark``, as names below ``root``; not those inside each other."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if name != UNFINISHED]
        relative = os.path.relpath(folder, root)
        if mark in files:
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
    names = {name for root in pipeline_roots() for name in _folders_below(root) if _is_cogvideox(root / name)}
    own = [EMBEDDED.name] if _means_embedded(EMBEDDED.name) else []
    return sorted(name for name in names if not _means_embedded(name.split("/")[0])) + own


def _partial_names() -> list[str]:
    """Folders into which single parts of a pipeline were downloaded (``download.py``)."""
    return sorted({name for root in pipeline_roots() for name in _folders_below(root, RECORD)
                   if not is_file(root / name / INDEX)})


def partial_folders() -> list[Path]:
    """As ``_partial_names``: the folders themselves."""
    return [folder for name in _partial_names() for folder in _folders(name)]


def download_root(name: str) -> Path:
    """Where the pipeline ``name`` is downloaded to: where a folder of that name is, else the first folder for
    pipelines that can be written to.

    Raises:
        SpecError: there is none.
    """
    begun = [root for root in pipeline_roots() if is_folder(root / name)]
    roots = [Path(root) for root in folder_paths.get_folder_paths(PIPELINE_CATEGORY)]
    if begun:
        return begun[0]
    for root in roots:
        existing = next(place for place in (root, *root.parents) if os.path.exists(place))
        if is_folder(existing) and os.access(existing, os.W_OK | os.X_OK):
            return root
    raise SpecError(f"None of {[str(root) for root in roots]} can be written to. Change their permissions, or name "
                    "another folder as 'diffusers' in extra_model_paths.yaml.")


def pipeline_path(name: str) -> Path:
    """The folder of a pipeline.

    Raises:
        SpecError: there is none of this name; says where to put it.
    """
    for folder in _folders(name):
        if is_file(folder / INDEX):
            return folder
        _check_readable(folder)
    places = [str(root) for root in pipeline_roots()]
    raise SpecError(f"Pipeline folder {str(name)[:80]!r} not found: expected a folder with model_index.json in "
                    f"{places}; found {pipeline_names()}. Put the whole Hugging Face folder there and refresh.")


def _check_readable(folder: Path) -> None:
    try:
        os.stat(folder / INDEX)
    except FileNotFoundError:
        pass
    except OSError as error:  # of another user, or on a drive that is gone
        raise SpecError(f"{folder} cannot be read: {error.strerror}. Change its permissions, or choose another "
                        "pipeline.") from None


def component_names(component: str) -> list[str]:
    """Single files of a component, and the component folders of pipelines ('NAME/transformer'), complete or not."""
    names = [f"{name}/{component}" for name in [*pipeline_names(), *_partial_names()]]
    return file_names(component) + [name for name in names if _folders(name)]


def file_names(component: str) -> list[str]:
    """Single files of a component."""
    files = dict.fromkeys([*folder_paths.get_filename_list(FILE_CATEGORIES[component]), *_gguf_names(component)])
    return [name.replace(os.sep, "/") for name in files if name.lower().endswith(EXTENSIONS)]


def _gguf_names(component: str) -> list[str]:
    """GGUF files: ComfyUI's own list leaves them out, as it has no loader for them. There are none of a VAE."""
    if component == "vae":
        return []
    roots = [root for root in folder_paths.get_folder_paths(FILE_CATEGORIES[component]) if os.path.isdir(root)]
    found = {name for root in roots for name in folder_paths.recursive_search(root, [".git"])[0]}
    return sorted(name for name in found if name.lower().endswith(".gguf"))


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


def free_output_name(prefix: str) -> Path:
    """A new safetensors file below ComfyUI's output folder, numbered as ComfyUI's own save nodes do.

    Raises:
        SpecError: it would lie outside the output folder.
    """
    output = Path(folder_paths.get_output_directory())
    target = (output / os.path.normpath(prefix)).resolve()
    if not target.is_relative_to(output.resolve()) or target == output.resolve():
        raise SpecError(f"filename_prefix {prefix[:80]!r}: expected a name below {output}, such as "
                        "diffusion_models/CogVideoX.")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(output))
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def lora_path(name: str) -> Path:
    """The file of a LoRA.

    Raises:
        SpecError: there is none of this name; says where to put it.
    """
    full = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    if full is None:
        names = folder_paths.get_filename_list("loras")
        raise SpecError(f"LoRA {str(name)[:80]!r} not found: expected a file in "
                        f"{folder_paths.get_folder_paths('loras')}; found {len(names)}, such as {names[:5]}. Put the "
                        "file there and refresh the page.")
    return Path(full)
