"""Reading what is on disk: config files, safetensors headers, shard indexes. No weights are loaded here.

Pure: neither torch nor ComfyUI. Every error names the file and what to do.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..models.specs import SpecError

_MAX_HEADER = 100 * 2**20  # the limit of the safetensors format


class TensorInfo(NamedTuple):
    dtype: str  # as safetensors spells it: F32, F16, BF16, ...
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        SpecError: missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"Missing file: {path}. Download it again, with the whole folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid JSON ({error}). Download it again.") from None
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


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, from its header alone.

    Raises:
        SpecError: missing, not safetensors, or truncated.
    """
    raw, size = _raw_header(path)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        tensors = {key: TensorInfo(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]))
                   for key, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0) + 8 + len(raw)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # whatever else a header may hold
        raise SpecError(f"{path}: its header is damaged. Download it again.") from None
    if end != size:
        raise SpecError(f"{path} is truncated: expected {end} bytes, got {size}. Download it again.")
    return tensors, metadata


def pipeline_class(folder: Path) -> str:
    """The pipeline class that a folder's model_index.json names."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder: the shards that its index names, or its only file.

    Raises:
        SpecError: none, more than one without an index, or a shard is missing.
    """
    if not folder.is_dir():
        raise SpecError(f"Missing folder: {folder}. Download the whole pipeline folder again.")
    # A variant (model.fp16.safetensors) has one part more in its name: the plain file comes first.
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda file: (file.name.count("."), file.name))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise SpecError(f"{folder} lacks {missing or 'weights'}, which {indexes[0].name} names. "
                            "Download the missing files into this folder.")
        return [folder / name for name in names]
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    plain = [file for file in files if "." not in file.stem]
    if len(plain) == 1:
        return plain
    if len(files) > 1:
        raise SpecError(f"{folder}: expected one .safetensors file, or several and their .safetensors.index.json; got "
                        f"{[file.name for file in files]}. Keep one, or download the index too.")
    if not files:
        raise SpecError(f"{folder}: expected a .safetensors file; got {sorted(os.listdir(folder))}. "
                        "Download the weights in safetensors format.")
    return files


def fingerprint(path: Path) -> str:
    """Changes when a file below ``path`` (or ``path`` itself) is replaced: names, sizes and times, no content."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.exists()]
    return ";".join(f"{file.name},{stat.st_size},{stat.st_mtime_ns}" for file, stat in stats)


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """The tensors of all ``files`` together."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(read_header(file)[0])
    return tensors


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most values have."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        count = 1
        for length in info.shape:
            count *= length
        sizes[info.dtype] = sizes.get(info.dtype, 0) + count
    return max(sizes, key=lambda dtype: sizes[dtype])


_SCALE_SUFFIXES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant", "scaled_fp8")


def check_not_quantized(tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse weights that mean nothing without their scales.

    Raises:
        SpecError: the file holds scales of quantized weights.
    """
    scales = [key for key in tensors if key.endswith(_SCALE_SUFFIXES)]
    if scales:
        raise SpecError(f"{where} is quantized ({scales[0]} and {len(scales) - 1} more scales), which this version "
                        "cannot read. Expected bf16, fp16 or fp32 weights; download the unquantized file.")


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
