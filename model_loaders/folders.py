"""Where models are: names that users choose, and the paths behind them, through ComfyUI's ``folder_paths``.

HF pipeline folders and component folders lie under ``models/diffusers`` or ``models/CogVideo``, single files under
``diffusion_models``, ``text_encoders`` and ``vae``, and where other packs put them under ``CogVideo``. Names are paths
below those folders, with forward slashes. One pipeline comes with the pack: the embedded demo model.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import folder_paths

from ..models.specs import SpecError
from .download import UNFINISHED
from .files import INDEX, is_file, is_folder, pipeline_class
from .sources import parts_of

PIPELINE_CATEGORY = "diffusers"
LEGACY_FOLDER = "CogVideo"  # where people who used other packs have their pipeline folders
LEGACY_FILES = {"transformer": "GGUF", "vae": "VAE", "loras": "loras"}  # their folders for single files, in it
FILE_CATEGORIES = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
EMBEDDED = Path(__file__).resolve().parent.parent / "demo" / "CogX-Demo"  # its name means no other folder
# Of what is listed; what it is, its bytes say.
EXTENSIONS = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".ckpt", ".bin")
_MAX_DEPTH = 3


def pipeline_roots() -> list[Path]:
    """Where pipeline folders lie."""
    roots = list(folder_paths.get_folder_paths(PIPELINE_CATEGORY))
    return [Path(root) for root in dict.fromkeys([*roots, *_legacy_roots()])]


def _legacy_roots() -> list[str]:
    named = folder_paths.folder_names_and_paths.get(LEGACY_FOLDER, ([],))[0]
    return [*named, os.path.join(folder_paths.models_dir, LEGACY_FOLDER)]


def _folders(name: str) -> list[Path]:
    """The folders ``name`` below the roots."""
    return [place for place in _places(name) if is_folder(place)]


def _places(name: str) -> list[Path]:
    """Where ``name`` may be, below each root. Names cannot leave them: API clients send what they like."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or PurePosixPath(name).is_absolute() or any(p == ".." or ":" in p or "\\" in p for p in parts):
        return []
    roots = [EMBEDDED.parent] if _means_embedded(parts[0]) else pipeline_roots()
    return [root.joinpath(*parts) for root in roots]


def _means_embedded(first_part: str) -> bool:
    return first_part == EMBEDDED.name and is_file(EMBEDDED / INDEX)


def _folders_below(root: Path) -> list[tuple[str, bool]]:
    """``root`` ('.') and the folders below it by name, and whether each is a pipeline; not those inside of one."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if name != UNFINISHED]
        relative = os.path.relpath(folder, root)
        names.append((Path(relative).as_posix(), INDEX in files))
        if INDEX in files or (relative.count(os.sep) + 1 >= _MAX_DEPTH and relative != "."):
            subfolders.clear()
    return names


def _is_cogvideox(folder: Path) -> bool:
    try:
        return pipeline_class(folder).startswith("CogVideoX")
    except SpecError:
        return True  # damaged: listed, so that choosing it says what is wrong


def pipeline_names() -> list[str]:
    """Every CogVideoX pipeline folder (one whose model_index.json says so); last the embedded one."""
    names = {name for root in pipeline_roots() for name, whole in _folders_below(root)
             if whole and name != "." and _is_cogvideox(root / name)}
    own = [EMBEDDED.name] if _means_embedded(EMBEDDED.name) else []
    return sorted(name for name in names if not _means_embedded(name.split("/")[0])) + own


def _loose_parts() -> list[tuple[Path, str, str]]:
    """Component folders that are in no pipeline: the folder that each is in, its name below the root, and its kind."""
    return sorted((root / folder, (PurePosixPath(folder) / name).as_posix(), part)
                  for root in pipeline_roots() for folder, whole in _folders_below(root) if not whole
                  for name, part in parts_of(root / folder).items())


def partial_folders() -> list[Path]:
    """Folders that hold parts of a pipeline without its index; a part that lies below a root by itself."""
    return list(dict.fromkeys(folder if "/" in name else folder / name for folder, name, _ in _loose_parts()))


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
    """Single files of a component, the component folders of pipelines ('NAME/transformer'), and those in none."""
    names = [f"{name}/{component}" for name in pipeline_names()]
    names += dict.fromkeys(name for _, name, part in _loose_parts() if part == component)
    return file_names(component) + [name for name in names if _folders(name)]


def file_names(component: str) -> list[str]:
    """Single files of a component."""
    files = dict.fromkeys([*folder_paths.get_filename_list(FILE_CATEGORIES[component]), *_gguf_names(component)])
    named = [name.replace(os.sep, "/") for name in files if name.lower().endswith(EXTENSIONS)]
    return list(dict.fromkeys([*named, *_legacy_names(component)]))


def lora_names() -> list[str]:
    """LoRA files."""
    return list(dict.fromkeys([*folder_paths.get_filename_list("loras"), *_legacy_names("loras")]))


def _legacy_names(kind: str) -> list[str]:
    """Single files where other packs put them below ``CogVideo``, by name: 'GGUF/x.gguf'. ``kind``: of
    ``LEGACY_FILES``."""
    folder = LEGACY_FILES.get(kind)
    places = [Path(root, folder) for root in _legacy_roots() if folder and is_folder(Path(root, folder))]
    found = {f"{folder}/{name}" for place in places for name in folder_paths.recursive_search(str(place), [".git"])[0]}
    return sorted(name.replace(os.sep, "/") for name in found if name.lower().endswith(EXTENSIONS))


def _legacy_files(kind: str, name: str) -> list[Path]:
    return [place for place in _places(name) if is_file(place)] if name in _legacy_names(kind) else []


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
    found = [Path(full)] if full else _folders(name) or _legacy_files(component, name)
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
    found = [Path(full)] if full else _legacy_files("loras", name)
    if not found:
        names = lora_names()
        raise SpecError(f"LoRA {str(name)[:80]!r} not found: expected a file in "
                        f"{folder_paths.get_folder_paths('loras')}; found {len(names)}, such as {names[:5]}. Put the "
                        "file there and refresh the page.")
    return found[0]
