"""GGUF files: their header, and their tensors as they lie in the file. Nothing is unpacked here.

The header is read here and not with the package's ``GGUFReader``: it runs before every prompt, on files that may be
damaged, and the reader walks through whole vocabularies and trusts every count. The names of the types are the
package's. Pure: no ComfyUI; torch and numpy when tensors are read.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ..models.specs import SpecError
from .files import TensorInfo
from .gguf_blocks import FORMATS, dequantize

_MAX_ENTRIES = 100_000  # of a kind; the largest language models have a few thousand tensors
_MAX_NAME = 65_536
_MAX_STRINGS = 4_000_000  # in a list; the largest vocabularies have half a million
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}  # as safetensors spells them
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SHAPE_KEY = "comfy.gguf.orig_shape."  # where converters note the shape of a tensor that they had to reshape

# llama.cpp's names of a T5 encoder (gguf's constants.py), and transformers' for the same.
_T5_NAMES = {
    "token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm",
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_norm": "layer.0.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias", "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_T5_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.(\w+)")


class GGUFTensor(NamedTuple):
    """Where a tensor lies. ``type`` is ggml's name; ``shape`` in torch's order; ``offset`` from the file's begin."""

    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


_Entry = tuple[str, tuple[int, ...], int, int]  # name, shape, number of the type, offset
ValueT = TypeVar("ValueT")


class GGUFHeader(NamedTuple):
    tensors: dict[str, GGUFTensor]
    metadata: dict[str, Any]

    def info(self) -> dict[str, TensorInfo]:
        """The tensors as the readers of other files give them."""
        return {key: TensorInfo(_PLAIN.get(each.type, each.type), each.shape) for key, each in self.tensors.items()}


class _Damaged(Exception):
    """The header says what cannot be."""


class _Reader:
    """Little-endian numbers and strings of a file, never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.file.tell() else b""
        if len(data) != count:
            raise _Damaged(f"it ends within its header, at byte {self.size}")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, what: str) -> int:
        value = self.number("<Q")
        if value > _MAX_ENTRIES:
            raise _Damaged(f"it claims {value} {what}")
        return value

    def string(self) -> str:
        length = self.number("<Q")
        if length > min(_MAX_NAME, self.size):
            return self._skip(length)
        return self.take(length).decode("utf-8", errors="replace")

    def _skip(self, count: int) -> str:
        if count > self.size - self.file.tell():
            raise _Damaged(f"it ends within its header, at byte {self.size}")
        self.file.seek(count, 1)
        return ""

    def value(self, kind: int) -> Any:
        """A value of the metadata; arrays of strings (vocabularies) are passed over."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Damaged(f"it holds metadata of the unknown kind {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _STRING:
            if count > _MAX_STRINGS:  # that many empty ones fit into a file of zeros, and take minutes
                raise _Damaged(f"it claims {count} strings in one list")
            for _ in range(count):
                self._skip(self.number("<Q"))
            return None
        if inner not in _SCALARS:
            raise _Damaged(f"it holds an array of the unknown kind {inner}")
        width = struct.calcsize(_SCALARS[inner])
        if count > 16:  # no list that is read here is longer
            self._skip(count * width)
            return None
        return [self.number(_SCALARS[inner]) for _ in range(count)]


def _type_names() -> dict[int, tuple[str, int, int]]:
    """Of each type number: its name, and the values and bytes of a block."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise SpecError("GGUF files need the Python package gguf, which is not installed. Install it with the Python "
                        "that runs ComfyUI: pip install gguf") from error
    return {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}


def read_gguf_header(path: Path) -> GGUFHeader:
    """Tensors and metadata of a GGUF file, from its header alone, with llama.cpp's names of T5 translated.

    Raises:
        SpecError: missing, not GGUF, damaged, truncated, of an unknown type or architecture; the package is missing.
    """
    types = _type_names()
    with _opened(path) as reader:
        tensors, metadata = _read(reader, types, path)
    _check_architecture(metadata, path)
    return GGUFHeader(_translated(tensors), metadata)


def gguf_names(path: Path) -> list[str]:
    """The names of the tensors of any GGUF file, of whatever architecture and types; T5's are translated.

    Raises:
        SpecError: missing, not GGUF, or damaged.
    """
    with _opened(path) as reader:
        return list(_translated({entry[0]: entry for entry in _entries(reader)[0]}))


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    try:
        with open(path, "rb") as file:
            yield _Reader(file, path.stat().st_size)
    except FileNotFoundError:
        raise SpecError(f"Missing file: {path}. Download it again.") from None
    except _Damaged as error:
        raise SpecError(f"{path} is not a GGUF file that can be read: {error}. Download it again.") from None


def _entries(reader: _Reader) -> tuple[list[_Entry], dict[str, Any]]:
    """The tensors as they are listed, and the metadata."""
    if reader.take(4) != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    version = reader.number("<I")
    if version not in (2, 3):
        raise _Damaged(f"expected version 2 or 3, little-endian, got {version}")
    tensor_count, entry_count = reader.count("tensors"), reader.count("metadata entries")
    metadata = {}
    for _ in range(entry_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    return [_entry(reader) for _ in range(tensor_count)], metadata


def _read(reader: _Reader, types: Mapping[int, tuple[str, int, int]], path: Path,
          ) -> tuple[dict[str, GGUFTensor], dict[str, Any]]:
    entries, metadata = _entries(reader)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"it claims an alignment of {alignment}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        if kind not in types:
            raise SpecError(f"{path}: {name} is of the GGUF type {kind}, which is unknown; known: "
                            f"{sorted(t[0] for t in types.values())}. Update the package gguf, or take a Q8_0 file.")
        if types[kind][0] not in {*_PLAIN, *FORMATS}:
            raise SpecError(f"{path}: {name} is of the GGUF type {types[kind][0]}, which this version cannot unpack; "
                            f"it can: {[*_PLAIN, *FORMATS]}. Take a file of such a type, Q8_0 for example.")
        tensors[name] = _located(name, shape, types[kind], start + offset, metadata)
    end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=0)
    if end > reader.size:
        raise SpecError(f"{path} is truncated: expected {end} bytes, got {reader.size}. Download it again.")
    return tensors, metadata


def _entry(reader: _Reader) -> _Entry:
    name = reader.string()
    dimensions = reader.number("<I")
    if dimensions > 8:
        raise _Damaged(f"{name[:80]} has {dimensions} dimensions")
    shape = tuple(reversed([reader.number("<Q") for _ in range(dimensions)]))
    return name, shape, reader.number("<I"), reader.number("<Q")


def _located(name: str, shape: tuple[int, ...], kind: tuple[str, int, int], offset: int,
             metadata: Mapping[str, Any]) -> GGUFTensor:
    type_name, block, block_bytes = kind
    values = 1
    for length in shape:
        values *= length
    if (shape and shape[-1] % block) or values % block:
        raise _Damaged(f"{name[:80]} has rows of {shape[-1]} values, not a multiple of the {block} of {type_name}")
    original = metadata.get(_SHAPE_KEY + name)
    if original is not None:
        lengths = original if isinstance(original, list) else [-1]
        if not all(type(n) is int and n >= 0 for n in lengths) or math.prod(lengths) != values:
            raise _Damaged(f"{_SHAPE_KEY}{name[:80]} is {original}, which is not {values} values")
        shape = tuple(int(length) for length in original)
        if len(shape) == 2 and shape[-1] % block:
            raise _Damaged(f"{name[:80]} has rows of {shape[-1]} values, not a multiple of the {block} of {type_name}")
    return GGUFTensor(type_name, shape, offset, values // block * block_bytes)


def _check_architecture(metadata: Mapping[str, Any], path: Path) -> None:
    """Refuse a language model by its name: its keys would say only that they are not those of CogVideoX.

    What a converter of video models writes there differs, so any other name is left to the keys.
    """
    from gguf.constants import MODEL_ARCH_NAMES

    found = metadata.get("general.architecture")
    if found in set(MODEL_ARCH_NAMES.values()) - {"t5", "t5encoder"}:
        raise SpecError(f"{path}: expected a CogVideoX transformer or a T5 encoder, got a GGUF file of the "
                        f"architecture {found!r}. Choose another file.")


def _translated(tensors: dict[str, ValueT]) -> dict[str, ValueT]:
    """Names of llama.cpp as transformers has them, where this is a T5 encoder; its decoder, if any, is left out."""
    if not any(_T5_BLOCK.match(name) for name in tensors):
        return tensors
    return {_t5_name(name): tensor for name, tensor in tensors.items() if not name.startswith("dec.")}


def _t5_name(name: str) -> str:
    block = _T5_BLOCK.fullmatch(name)
    if block is None:
        stem, _, parameter = name.rpartition(".")
        return f"{_T5_NAMES.get(stem, stem)}.{parameter}"
    number, part, parameter = block.groups()
    return f"encoder.block.{number}.{_T5_NAMES.get(part, part)}.{parameter}"


def read_gguf_tensors(path: Path, header: GGUFHeader) -> dict[str, Any]:
    """The tensors, memory mapped: plain ones in their type and shape, packed weights as uint8 [rows, bytes] if they
    are matrices, as one row if not. What is packed and no weight (a table of positions) is unpacked."""
    import numpy as np
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    # Copy on write: torch wants a buffer that it may write to, and nothing is ever written.
    data = np.memmap(path, mode="c")
    found = {}
    for key, tensor in header.tensors.items():
        raw = torch.from_numpy(data[tensor.offset:tensor.offset + tensor.size])
        if tensor.type in dtypes:
            found[key] = raw.view(dtypes[tensor.type]).reshape(tensor.shape)
        else:
            packed = raw.reshape(tensor.shape[0] if len(tensor.shape) == 2 else 1, -1)
            found[key] = packed if key.endswith(".weight") else dequantize(
                packed, tensor.type, torch.float32).reshape(tensor.shape)
    return found
