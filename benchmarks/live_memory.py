"""Peak live tensor memory by accounting, on any device and on the meta device, where nothing is computed.

Counts the storages that operations allocate and that are still referenced. What it cannot see: workspaces inside a
kernel (cuDNN, cuBLAS), rounding and fragmentation of the allocator, and the CUDA context.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_LIBRARIES = (*(os.path.join(os.sep, name, "") for name in ("torch", "einops", "comfy_kitchen")),
              os.path.join("comfy", "ops.py"), __file__)


@dataclass(frozen=True)
class Allocation:
    """One storage: its size, the operation that made it, and the line of the network that called for it."""

    bytes: int
    operation: str
    shape: tuple[int, ...]
    line: str


class LiveMemory(TorchDispatchMode):
    """Accounts for what operations allocate while it is active; what existed before (weights, inputs) is not counted.

    Attributes:
        live: bytes alive now. peak: the most that were ever alive at once. hosted: bytes that ``host`` has given.
        at_peak: the allocations alive at the peak, the one that reached it last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.hosted = 0
        self.at_peak: list[Allocation] = []
        self._alive: dict[int, Allocation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            # In inference mode composite operations arrive whole; what they are made of is what allocates. The C++
            # composition, as CUDA takes it: func.decompose would take Python ones where torch has them, which
            # allocate more (nearest upsampling by fp32 indexing).
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        out = func(*args, **kwargs)
        if made := [tensor for tensor in _tensors(out) if _key(tensor) not in self._alive]:
            before = {_key(t) for t in _tensors((args, kwargs))}
            for tensor in made:
                if _key(tensor) not in before:
                    self._count(tensor, func)
        return out

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that stands for host memory, whatever device it is on: it is not counted."""
        with torch._C._DisableTorchDispatch():
            tensor = torch.empty(shape, dtype=dtype, device="meta")
        self.hosted += tensor.nbytes
        return tensor

    def _count(self, tensor: Tensor, func: Any) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive or storage.nbytes() == 0:
            return
        self._alive[key] = Allocation(storage.nbytes(), str(func), tuple(tensor.shape), _line_of_network())
        # Python's storage object lives as long as the storage itself, so its end is the end of the memory.
        weakref.finalize(storage, self._release, key).atexit = False
        self.live += storage.nbytes()
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = list(self._alive.values())

    def _release(self, key: int) -> None:
        self.live -= self._alive.pop(key).bytes

    def describe_peak(self, count: int = 12) -> str:
        """The peak as text: the operation that reached it and the largest allocations alive then."""
        last = self.at_peak[-1]
        lines = [f"peak {self.peak / 2**20:.1f} MiB, reached by {last.operation} at {last.line}"]
        for a in sorted(self.at_peak, key=lambda a: -a.bytes)[:count]:
            lines.append(f"  {a.bytes / 2**20:9.1f} MiB  {a.operation:38} {list(a.shape)!s:28} {a.line}")
        return "\n".join(lines)


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        return (tree,)
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _line_of_network() -> str:
    """Where the running operation was written: the innermost line that belongs to no library of layers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and any(part in frame.f_code.co_filename for part in _LIBRARIES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "unknown"


class AsOnCuda(TorchFunctionMode):
    """Makes the meta device allocate as a CUDA device does, for two functions.

    Attention gives its output, in the layout of the queries, and no matrix of scores: torch would choose its plain
    formula on the meta device. A copy to the CPU takes no memory of the device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return torch.empty_like(args[0])
        if func is Tensor.cpu and args[0].device.type == "meta":
            return args[0].new_empty(1).expand(args[0].shape)
        return func(*args, **(kwargs or {}))


@contextmanager
def accounting() -> Iterator[LiveMemory]:
    """Account for everything inside, without gradients and with fused attention."""
    with torch.inference_mode(), AsOnCuda(), LiveMemory() as memory:
        yield memory


def peak_of(run: Callable[[], Any]) -> LiveMemory:
    """The account of one call."""
    with accounting() as memory:
        run()
    return memory
