"""How a decode or encode gets its memory: a plan that fits, and a ladder of smaller ones for when it does not.

A video goes down only as far as it must: free other models and the cache, halve the strips, caches to host memory,
residuals too, then all values, which is the same picture; then tiles, which is not quite; then the CPU. Frames that go
to a file go to the CPU first: tiles hold all of them in RAM.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import torch
from torch import Tensor

from ..models.cogvideox.vae_plan import MIN_ROWS, SMALLEST, Budget, Memory, Plan, choose, smaller_plans

log = logging.getLogger("cogx")

GB = 1e9
RAM_SHARE = 0.8  # of the free RAM that host memory may take
PINNED_SHARE = 0.5  # of all RAM that may be pinned: no other program can have it
UNIFIED = ("cpu", "mps")  # devices whose memory is the RAM
FREE = "free other models and the cache"


@dataclass(frozen=True)
class Work:
    """A video to decode or encode.

    Attributes:
        words: what it is, as in "decoding 49 frames of 720x480".
        memory: what a plan takes. cpu_plan: the plan for a CPU. cpu_bytes: what it takes there, in fp32.
        run: does it exactly, on a device, and gives what it made. tiled: does it in tiles. tiles_last: after the CPU.
    """

    words: str
    memory: Callable[[Plan], Memory]
    cpu_plan: Plan
    cpu_bytes: float
    run: Callable[[Plan, torch.device], Any]
    tiled: Callable[[], Any]
    tiles_last: bool = False


class Rung(NamedTuple):
    words: str
    run: Callable[[], Any]


def budget_of(device: torch.device, network: Any = None, weights: float = 0.0) -> Budget:
    """What ComfyUI's memory manager can give on a device to a network. weights: bytes of it still to be loaded."""
    free = comfy.model_management.get_free_memory(device)
    if device.type in UNIFIED:
        return Budget(free, unified=True)
    free -= weights + comfy.model_management.extra_reserved_memory()  # the reserve is for workspaces of the kernels
    others = sum(loaded.model_loaded_memory() for loaded in comfy.model_management.current_loaded_models
                 if loaded.model is not None and loaded.device == device and loaded.model.model is not network)
    return Budget(free, _free_ram(), others)


def _free_ram() -> float:
    return RAM_SHARE * comfy.model_management.get_free_memory(torch.device("cpu"))


def exact_or_smaller(work: Work, device: torch.device, budget: Budget) -> Any:
    """Exactly if there is any way; see the module.

    Raises:
        OOM_EXCEPTION: nothing was enough; says what was tried. Any other error comes through at once.
    """
    return climb_down(work.words, _rungs(work, device, budget))


def _rungs(work: Work, device: torch.device, budget: Budget) -> Iterator[Rung]:
    on_cpu = comfy.model_management.is_device_cpu(device)

    def fits_ram(plan: Plan) -> bool:
        return on_cpu or work.memory(plan).host <= _free_ram()

    plan = choose(work.memory, budget, work.cpu_plan)
    if plan is None:  # by the estimates, which leave a reserve: what needs least may still go
        plan = next((p for p in (SMALLEST, Plan(MIN_ROWS)) if fits_ram(p)), SMALLEST)
        log.warning("Memory is short for %s: by the estimate %.1f GB are needed, and %.1f GB are free.", work.words,
                    work.memory(plan).device / GB, (budget.free + budget.others) / GB)
    yield Rung(str(plan), partial(work.run, plan, device))
    yield Rung(FREE, partial(_after_freeing, device, partial(work.run, plan, device)))
    for smaller in filter(fits_ram, smaller_plans(plan)):
        yield Rung(str(smaller), partial(work.run, smaller, device))
    last = [Rung("tiles, which change the picture slightly", work.tiled)]
    if not on_cpu and work.cpu_bytes <= _free_ram():
        last.append(Rung("the CPU, which takes long", partial(work.run, work.cpu_plan, torch.device("cpu"))))
    yield from reversed(last) if work.tiles_last else last


def only(words: str, run: Callable[[], Any], device: torch.device) -> Iterator[Rung]:
    """The rungs of a way that the user insists on."""
    yield Rung(words, run)
    yield Rung(FREE, partial(_after_freeing, device, run))


def _after_freeing(device: torch.device, run: Callable[[], Any]) -> Any:
    comfy.model_management.free_memory(1e30, device)
    return run()


def climb_down(words: str, rungs: Iterator[Rung], remedy: str = "take a smaller size or fewer frames") -> Any:
    """The result of the first rung that has the memory. remedy: what the user may do if none has.

    Raises:
        OOM_EXCEPTION: none had.
    """
    tried: list[str] = []
    reason = "no way was open"
    for rung in rungs:
        if tried:
            log.warning("Out of memory in %s with %s. Next: %s.", words, tried[-1], rung.words)
        else:
            log.info("%s: %s.", words.capitalize(), rung.words)
        out, reason = _attempt(rung.run)
        if out is not None:
            return out
        tried.append(rung.words)
    raise comfy.model_management.OOM_EXCEPTION(
        f"Out of memory in {words}. Tried: {'; '.join(tried)}. Close other programs that use the GPU, or {remedy}. "
        f"({reason})")


def _attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or None and why, once the error is gone, and with its traceback the tensors of the failed try."""
    try:
        return run(), ""
    except Exception as error:  # noqa: BLE001 - the host knows which errors mean out of memory
        comfy.model_management.raise_non_oom(error)
        reason = str(error).partition("\n")[0]
    gc.collect()
    comfy.model_management.soft_empty_cache()
    return None, reason


class HostMemory:
    """Host memory for one video, pinned where there is room for that, so that copies run beside the computation."""

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []
        self._room = PINNED_SHARE * comfy.model_management.get_total_memory(torch.device("cpu"))

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *error: Any) -> None:
        for tensor in self._pinned:
            comfy.model_management.unpin_memory(tensor)

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Raises:
            OOM_EXCEPTION: the RAM is full.
        """
        try:
            tensor = torch.empty(shape, dtype=dtype)
        except RuntimeError as error:  # so torch says that there is no RAM
            raise comfy.model_management.OOM_EXCEPTION(f"out of RAM: {error}") from error
        if tensor.nbytes <= self._room and comfy.model_management.pin_memory(tensor):
            self._room -= tensor.nbytes
            self._pinned.append(tensor)
        return tensor
