"""How things are measured: seconds with the device synchronised, peak memory, and peak live memory by accounting."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .contenders import CONTENDERS, Contender, Work
from .live_memory import peak_of
from .setting import Setting

OVERHEAD_STEPS = 50  # steps without a network are short: enough of them for a steady median


@dataclass(frozen=True)
class Plan:
    """How often. ``repeat``: timed calls after one that is not; ``steps``: of a timed sampling run."""

    repeat: int
    steps: int
    sampler: str


@dataclass(frozen=True)
class Result:
    """One measure of one contender.

    ``seconds``: every timed call. ``peak``: bytes, weights included where the device counts them, else without.
    ``work``: floating-point operations of one call, 0 if not counted.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    weights: int = 0
    work: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """``accounted`` runs on the meta device at full size and is no time."""

    title: str
    run: Callable[[Contender, Plan], Result]
    accounted: bool = False


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that torch had allocated at most since ``reset_peak``; None where it does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def forward_operations(setting: Setting, batch: int) -> float:
    """Multiplications and additions of one transformer forward: the linear layers of every token, and attention.

    Per block 4 D^2 weights of attention and 8 D^2 of the MLP; attention itself 4 S^2 D.
    """
    network = setting.spec.transformer
    _, _, t, h, w = setting.latent_shape
    tokens = t * h * w // (network.temporal_patch * network.patch_size**2) + setting.spec.text_tokens
    dim = network.hidden_size
    return float(batch * network.num_layers * (24 * tokens * dim**2 + 4 * tokens**2 * dim))


def time_calls(work: Work, device: torch.device, plan: Plan) -> Result:
    work()
    synchronise(device)
    reset_peak(device)
    seconds = []
    for _ in range(plan.repeat):
        start = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return Result(seconds, peak_memory(device))


def time_forward(batch: int) -> Callable[[Contender, Plan], Result]:
    def run(contender: Contender, plan: Plan) -> Result:
        result = time_calls(contender.forward(batch), contender.setting.device, plan)
        return replace(result, work=forward_operations(contender.setting, batch))

    return run


def time_steps(instantaneous: bool) -> Callable[[Contender, Plan], Result]:
    """Seconds from the end of one step to the end of the next. What comes before the first step's end, loading
    included, is left out."""

    def run(contender: Contender, plan: Plan) -> Result:
        device = contender.setting.device
        steps = max(plan.steps, OVERHEAD_STEPS) if instantaneous else plan.steps
        loop = contender.sampling(steps, plan.sampler, instantaneous)
        ends: list[float] = []

        def tick() -> None:
            synchronise(device)
            ends.append(time.perf_counter())

        loop(tick)
        reset_peak(device)
        seconds = []
        for _ in range(plan.repeat):
            ends.clear()
            loop(tick)
            seconds += [later - earlier for earlier, later in itertools.pairwise(ends)]
        work = 0.0 if instantaneous else forward_operations(contender.setting, 2)
        return Result(seconds, None if instantaneous else peak_memory(device), work=work)

    return run


def time_work(name: str) -> Callable[[Contender, Plan], Result]:
    def run(contender: Contender, plan: Plan) -> Result:
        return time_calls(getattr(contender, name)(), contender.setting.device, plan)

    return run


def account(build: Callable[[Contender], Work]) -> Callable[[Contender, Plan], Result]:
    def run(contender: Contender, plan: Plan) -> Result:
        memory = peak_of(build(contender))
        last = memory.at_peak[-1]
        return Result(peak=memory.peak, note=f"{last.operation.removesuffix('.default')} at {last.line}")

    return run


MEASURES: dict[str, Measure] = {
    "forward": Measure("transformer forward, batch 2 (both halves of guidance)", time_forward(2)),
    "forward-1": Measure("transformer forward, batch 1", time_forward(1)),
    "step": Measure("sampling step with guidance", time_steps(instantaneous=False)),
    "overhead": Measure("sampling step around a network that does nothing", time_steps(instantaneous=True)),
    "decode": Measure("VAE decode of the clip, untiled", time_work("decode")),
    "encode": Measure("VAE encode of the clip, untiled", time_work("encode")),
    "text": Measure("text encode of one prompt", time_work("text")),
    "live-forward": Measure("transformer forward, batch 2", account(lambda c: c.forward(2)), accounted=True),
    "live-forward-1": Measure("transformer forward, batch 1", account(lambda c: c.forward(1)), accounted=True),
    "live-decode": Measure("VAE decode of the clip, untiled", account(lambda c: c.decode()), accounted=True),
    "live-encode": Measure("VAE encode of the clip, untiled", account(lambda c: c.encode()), accounted=True),
}


def run_measure(name: str, contender: str, setting: Setting, plan: Plan) -> Result:
    """Build, run and drop one contender for one measure.

    Raises:
        NotMeasured: the contender has no such thing.
    """
    measure = MEASURES[name]
    with torch.inference_mode():
        made = CONTENDERS[contender](setting)
        torch.manual_seed(0)
        result = measure.run(made, plan)
    return replace(result, weights=made.weights, note=result.note or made.description())


def versions() -> dict[str, str]:
    """What ran, as the table names it; a package that is not there is 'absent'."""
    found = {"Python": platform.python_version(), "torch": torch.__version__,
             "CUDA": torch.version.cuda or "none", "cuDNN": str(torch.backends.cudnn.version() or "none")}
    try:
        import comfyui_version
    except ImportError:
        found["ComfyUI"] = "absent"
    else:
        found["ComfyUI"] = comfyui_version.__version__
    for name in ("diffusers", "transformers", "comfy-kitchen", "comfy-aimdo"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def gpu_words() -> str:
    """The GPU; empty without one."""
    if not torch.cuda.is_available():
        return ""
    p = torch.cuda.get_device_properties(0)
    return f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors"
