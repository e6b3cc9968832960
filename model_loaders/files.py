"""Reading what is on disk: config files, safetensors headers, shard indexes. No weights are loaded here.

Pure: neither torch nor ComfyUI. Every error names the file and what to do.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..models.specs import SpecError

_MAX_HEADER = 16 * 2**20  # a CogVideoX file has one of 0.2 MB; the rest is room for workflows in the metadata
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "I64": 64,
         "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64}


INDEX, CONFIG = "model_index.json", "config.json"
SAFETENSORS = (".safetensors", ".sft")
_STARTS = {b"PK\x03\x04": "torch", b"GGUF": "gguf",
           **{bytes([0x80, protocol]): "old torch" for protocol in range(2, 6)}}  # a bare pickle


class TensorInfo(NamedTuple):
    dtype: str  # as safetensors spells it: F32, F16, BF16, ...
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        SpecError: missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors put a mark in front
    except FileNotFoundError:
        raise SpecError(f"Missing file: {path}. Download it again, with the whole folder.") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder, not a file. Remove it and download the file.") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid JSON ({error}). Correct it, or download it again.") from None
    except OSError as error:  # another user's, a link to itself, a drive that is gone
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(value, dict):
        raise SpecError(f"{path}: expected a JSON object, got {type(value).__name__}. Download it again.")
    return value


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The JSON header of a safetensors file, and the size of the file."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size):
                raise SpecError(f"{path} is not a safetensors file or is truncated ({size} bytes). Download it again.")
            return file.read(length), size
    except FileNotFoundError:
        raise SpecError(f"Missing file: {path}. Download it again, with the whole folder.") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder, not a safetensors file. Remove it and download the file.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header alone.

    Raises:
        SpecError: missing, not safetensors, or truncated.
    """
    raw, size = _raw_header(path)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        tensors = {key: _tensor_info(entry) for key, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0) + 8 + len(raw)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        raise SpecError(f"{path}: its header is damaged. Download it again.") from None
    if end != size:
        raise SpecError(f"{path} is truncated: expected {end} bytes, got {size}. Download it again.")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor_info(entry: Any) -> TensorInfo:
    """An entry of a header. ValueError and the like: its shape and its bytes contradict each other."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    # Before anything is computed with them: a string times a number is a long string.
    whole = len(shape) <= 8 and all(type(number) is int and 0 <= number < 2**63 for number in (start, end, *shape))
    if not whole or _BITS[dtype] * math.prod(shape) != 8 * (end - start):
        raise ValueError(f"{shape} of {dtype} in {start} to {end}")
    return TensorInfo(dtype, tuple(shape))


def kind_of(path: Path) -> str:
    """What a file is by its first bytes: 'safetensors', 'torch' (a zip), 'old torch', 'gguf', 'other'.

    Raises:
        SpecError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(9)
    except FileNotFoundError:
        raise SpecError(f"Missing file: {path}. Download it again, with the whole folder.") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder, not a file of weights. Remove it and download the file.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None
    if first[8:] == b"{":  # after the length of the header, which is JSON
        return "safetensors"
    found = next((kind for start, kind in _STARTS.items() if first.startswith(start)), "other")
    # What is truncated, or a web page under this name, is better explained by reading it.
    return "safetensors" if found == "other" and path.suffix in SAFETENSORS else found


def readable_kind(path: Path) -> str:
    """'safetensors', 'torch' or 'gguf'.

    Raises:
        SpecError: as ``kind_of``; it is none of them.
    """
    kind = kind_of(path)
    if kind not in ("safetensors", "torch", "gguf"):
        what = "a torch file from before torch 1.6, or another pickle" if kind == "old torch" else "something else"
        raise SpecError(f"{path}: expected a safetensors, GGUF or torch file, got {what}. Download the safetensors "
                        "version.")
    return kind


def pipeline_class(folder: Path) -> str:
    """The pipeline class that a folder's model_index.json names."""
    return str(read_json(folder / INDEX).get("_class_name"))


def is_file(path: Path) -> bool:
    """Whether it is a file; not if that cannot be known (``Path.is_file`` raises in a folder of another user)."""
    return os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """As ``is_file``."""
    return os.path.isdir(path)


def is_mounted(folder: Path) -> bool:
    """Whether ``folder`` lies on another disk than the folder that it is in: a mount, or a junction of Windows, which
    Python takes for neither a link nor a mount."""
    try:
        return os.stat(folder).st_dev != os.stat(folder.parent).st_dev
    except OSError:  # it is not there yet
        return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder: the shards that its index names, or its only file.

    Raises:
        SpecError: none, more than one without an index, or a shard is missing.
    """
    if not is_folder(folder):
        raise SpecError(f"Missing folder: {folder}. Download the whole pipeline folder again.")
    # A variant (model.fp16.safetensors) has one part more in its name: the plain file comes first.
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda file: (file.name.count("."), file.name))
    if indexes:
        return _shards(folder, _names_in(indexes[0]), f"{indexes[0].name} names")
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    plain = [file for file in files if "." not in file.stem]
    if len(plain) == 1:
        return plain
    if len(files) > 1:
        raise SpecError(f"{folder}: expected one .safetensors file, or several and their .safetensors.index.json; got "
                        f"{[file.name for file in files]}. Keep one, or download the index too.")
    if not files:
        raise SpecError(f"{folder}: expected a .safetensors file; got {_listed(folder)}. Download the weights in "
                        "safetensors format.")
    return files


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise SpecError(f"{folder} cannot be read: {error.strerror}. Change its permissions.") from None


def _names_in(index: Path) -> list[str]:
    """The files that a shard index names; no paths, which could leave the folder."""
    weight_map = read_json(index).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    return sorted(name for name in names if Path(name).name == name)


def _shards(folder: Path, names: list[str], who: str) -> list[Path]:
    missing = [name for name in names if not is_file(folder / name)]
    if missing or not names:
        raise SpecError(f"{folder} lacks {missing or 'weights'}, which {who}. "
                        "Download the missing files into this folder.")
    return [folder / name for name in names]


_NUMBERED_FILE = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)")


def weight_set(path: Path) -> list[Path]:
    """The files of a component: a folder's, the whole set if ``path`` is one of its shards, or ``path`` alone.

    Raises:
        SpecError: as ``weight_files``; a shard of the set is missing.
    """
    if is_folder(path) or not (path.suffix or os.path.exists(path)):  # a part of a pipeline that is not there
        return weight_files(path)
    for index in sorted(path.parent.glob("*.index.json")):
        try:
            names = _names_in(index)
        except SpecError:
            continue  # the index of another model
        if path.name in names:
            return _shards(path.parent, names, f"{index.name} names")
    numbered = _NUMBERED_FILE.fullmatch(path.name)
    if numbered is None:
        return [path]
    start, _, count, end = numbered.groups()
    names = [f"{start}{number:05}-of-{count}{end}" for number in range(1, min(int(count), 1000) + 1)]
    return _shards(path.parent, names, f"belong to the same set as {path.name}")


def component_folder(path: Path) -> Path | None:
    """The folder whose config.json belongs to the weights at ``path``: itself, or the one where they lie alone."""
    if is_folder(path):
        return path
    if not is_file(path.parent / CONFIG):
        return None
    try:
        return path.parent if weight_files(path.parent) == weight_set(path) else None
    except SpecError:
        return None


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most values have."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        count = 1
        for length in info.shape:
            count *= length
        sizes[info.dtype] = sizes.get(info.dtype, 0) + count
    return max(sizes, key=lambda dtype: sizes[dtype])


# A weight of such a block that the architecture does not have means a shallower config, not a stray tensor.
_NUMBERED_BLOCK = re.compile(r"transformer_blocks\.|encoder\.block\.|(encoder|decoder)\.(down|up|mid)_blocks?\.")


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse weights that do not fit the architecture.

    Raises:
        SpecError: keys are missing or shapes differ; names the first three.
    """
    missing = [key for key in expected if key not in found]
    if missing:
        raise SpecError(f"{where}: {len(missing)} of {len(expected)} weights are missing, such as {missing[:3]}. The "
                        "file is incomplete or its config.json belongs to another model; download both again.")
    surplus = [key for key in found if key not in expected and _NUMBERED_BLOCK.match(key)]
    if surplus:
        raise SpecError(f"{where}: {len(surplus)} weights more than its config.json says, such as {surplus[:3]}. "
                        "The config.json belongs to another model; download the one that belongs to these weights.")
    wrong = [key for key in expected if tuple(found[key]) != tuple(expected[key])]
    if wrong:
        shown = "; ".join(f"{key}: expected {list(expected[key])}, got {list(found[key])}" for key in wrong[:3])
        raise SpecError(f"{where}: {len(wrong)} weights have another shape than its config.json says. {shown}. "
                        "Download the config.json that belongs to these weights.")
