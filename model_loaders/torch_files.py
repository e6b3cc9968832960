"""Reading torch files (.pt, .pth, .ckpt, .bin): memory mapped, and never with code in them.

``torch.load(weights_only=True)`` builds tensors and plain Python values only. What asks for anything else is refused
before it runs.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..models.specs import SpecError
from .files import TensorInfo

# The dicts that the authors' trainer, DeepSpeed and Lightning put around the weights, outermost first.
_WRAPPERS = ("model", "module", "state_dict")
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8"}
_MAX_PICKLE = 64 * 2**20  # the description of the tensors, without their values; 0.3 MB in the published files


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch file by their keys, memory mapped.

    Raises:
        SpecError: it holds code, is damaged or compressed, or holds no tensors.
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(_plain_values()):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise SpecError(_refusal(path, error)) from None
    except Exception as error:  # noqa: BLE001 - a damaged file makes the reader fail in any way, here and in C++
        raise SpecError(f"{path} is damaged ({type(error).__name__}: {str(error)[:120]}). Download it again.") from None
    for name in _WRAPPERS:
        if isinstance(values, dict) and isinstance(values.get(name), dict):
            values = values[name]
    tensors = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, torch.Tensor)
               } if isinstance(values, dict) else {}
    if not tensors:
        raise SpecError(f"{path}: expected a dict of tensors, got {type(values).__name__} without any. Choose a file "
                        "of model weights.")
    for key, tensor in tensors.items():
        _check_tensor(path, key, tensor)
    return tensors


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """The tensors as the readers of headers give them."""
    return {key: TensorInfo(_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape))
            for key, value in tensors.items()}


def _check_archive(path: Path) -> None:
    """Refuse what would unpack to more than it is, before anything is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SpecError(f"{path} is truncated or damaged ({error}). Download it again.") from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise SpecError(f"{path}: {packed[0]} in it is compressed, which torch's files are not: it is another kind of "
                        "archive. Choose a file of model weights.")
    if any(entry.filename.endswith(".pkl") and entry.file_size > _MAX_PICKLE for entry in entries):
        raise SpecError(f"{path}: its description of the tensors is larger than any model's. Download it again.")


def _plain_values() -> list[Any]:
    """What training checkpoints hold beside the weights and torch does not know: numpy's random state, options."""
    import numpy

    rebuild = numpy.zeros(0).__reduce__()[0]
    return [(rebuild, "numpy.core.multiarray._reconstruct"), (rebuild, "numpy._core.multiarray._reconstruct"),
            numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32")), argparse.Namespace]


def _refusal(path: Path, error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|class|Unsupported class) ['\"]?([\w.]+)", str(error))
    what = f"asks for {found[1]}" if found else "asks for more than tensors"
    return (f"{path} holds code or is damaged: it {what}. It was refused and nothing in it was run. Take the "
            "safetensors version of this model.")


def _check_tensor(path: Path, key: str, tensor: torch.Tensor) -> None:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # An expanded tensor claims more values than the file holds, and would take the memory when it is copied.
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise SpecError(f"{path}: {key} is no plain tensor with all of its values. Download the file again.")
