"""What a run takes and what will be chosen for it, before anything is loaded. Pure: numbers in, numbers out.

Every size is in bytes. A place is a device as ComfyUI uses it: everything else leaves it when a stage needs it, and
weights that do not fit are streamed from RAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..models.cogvideox.vae_plan import Memory, Plan
from ..models.specs import Geometry, TextSpec

GB = 1e9
FP32 = 4
# ComfyUI runs the conditions of guidance in one forward if so many times its estimate is free (calc_cond_batch).
TOGETHER_FACTOR = 1.5

ENCODES = ("auto", "none", "image", "video")  # what is encoded; auto: an image if the model takes one

TOGETHER, IN_TURN, ONE_BY_ONE = "together", "in_turn", "one_by_one"
WORDS = {TOGETHER: "the halves of guidance run together", IN_TURN: "the halves of guidance run in turn",
         ONE_BY_ONE: "every half of every video runs by itself"}


def text_memory(spec: TextSpec, tokens: int, value: int, fused: bool) -> float:
    """Peak of T5 for one prompt, beside its weights, as ComfyUI runs it: in fp32, one cast weight at a time.

    value: bytes of a stored weight. fused: attention keeps no scores, as on a GPU.
    """
    wide, hidden = tokens * spec.d_model * FP32, tokens * spec.d_ff * FP32
    heads = spec.num_heads * spec.d_kv
    inner = tokens * heads * FP32
    cast = FP32 * spec.d_model if value < FP32 else 0  # for each of a weight's rows
    bias = spec.num_heads * tokens**2 * FP32  # of the positions; scores are as large
    gated = spec.feed_forward_proj.startswith("gated")
    attention = 2 * wide + (3 * inner + 2 * bias if fused else 7 * inner + 3 * bias)
    feed_forward = 2 * wide + bias + (3 if gated else 2) * hidden + wide + cast * spec.d_ff
    return wide + max(attention, feed_forward, 2 * wide + bias + 2 * inner + cast * heads)


@dataclass(frozen=True)
class Place:
    """Where a stage runs.

    Attributes:
        limit: what its weights and its values may take together. kept: what ComfyUI leaves free of weights besides.
        streams: weights that do not fit stay in RAM; not on a CPU.
        yields: weights leave for whatever a forward needs (ComfyUI's dynamic VRAM), so that they cost no room.
    """

    device: str
    limit: float
    kept: float
    streams: bool
    yields: bool = False

    def resident(self, weights: float, needed: float) -> float:
        """How much of the weights will be on the device, if a stage needs so much beside them."""
        if not self.streams:
            return weights
        return min(max(self.limit - needed - self.kept, 0.0), weights)


@dataclass(frozen=True)
class Stage:
    """A step of a run. peak: beside the weights. host: values in RAM. choice: None if it does not fit."""

    device: str
    dtype: str
    weights: float
    resident: float
    peak: float
    choice: str | Plan | None
    host: float = 0.0

    @property
    def fits(self) -> bool:
        return self.choice is not None

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {"device": self.device, "dtype": self.dtype, "weights": round(self.weights),
                "resident": round(self.resident), "streamed": round(self.weights - self.resident),
                "peak": round(self.peak), "fits": self.fits}

    def words(self) -> str:
        """Its peak, and where its weights will be."""
        where = "in RAM" if self.device == "cpu" else f"on {self.device}"
        weights = f"{_gb(self.weights)} of weights ({self.dtype}) {where}"
        if self.resident < self.weights:
            streamed = f"{_gb(self.weights - self.resident)} streamed from RAM"
            weights = f"{_gb(self.weights)} of weights ({self.dtype}), {_gb(self.resident)} {where}, {streamed}"
        return f"{_gb(self.peak)} beside {weights}"


def plan_text(weights: float, peak: float, dtype: str, place: Place) -> Stage:
    resident = place.resident(weights, 0.0)  # ComfyUI's own reserve is all that it keeps for a text encoder
    return Stage(place.device, dtype, weights, resident, peak, "encode" if resident + peak <= place.limit else None)


@dataclass(frozen=True)
class Sampling(Stage):
    """needs: peak of a forward for each choice; ``peak`` is that of the choice, or the smallest."""

    needs: tuple[tuple[str, float], ...] = ()

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "choice": self.choice, **{name: round(need) for name, need in self.needs}}


def plan_sampling(weights: float, forward: Callable[[int], float], batch: int, dtype: str, place: Place) -> Sampling:
    """forward: what one forward of so many videos takes. batch: videos, each of which has two halves of guidance."""
    needs = {TOGETHER: forward(2 * batch), IN_TURN: forward(batch), ONE_BY_ONE: forward(1)}
    resident = place.resident(weights, needs[IN_TURN])  # as load_models_gpu decides, before the first step
    free = place.limit if place.yields else place.limit - resident
    choice = next((name for name, need in needs.items()
                   if need * (TOGETHER_FACTOR if name == TOGETHER else 1) <= free), None)
    if place.yields:
        resident = place.resident(weights, needs[choice or ONE_BY_ONE])
    return Sampling(place.device, dtype, weights, resident, needs[choice or ONE_BY_ONE], choice,
                    needs=tuple(needs.items()))


@dataclass(frozen=True)
class Coding(Stage):
    """Encode or decode. ``choice`` is the VAE's Plan."""

    def numbers(self) -> dict[str, Any]:
        plan = self.choice
        chosen = {"rows": plan.rows, "host_caches": plan.host_caches, "values": plan.values, "words": str(plan)} \
            if isinstance(plan, Plan) else None
        return {**super().numbers(), "host": round(self.host), "plan": chosen}


def plan_coding(weights: float, memory: Callable[[Plan], Memory], plan: Plan | None, smallest: Plan, dtype: str,
                device: str) -> Coding:
    """plan: what the VAE's planner chooses now; without one, the numbers are those of the smallest."""
    need = memory(plan or smallest)
    return Coding(device, dtype, weights, weights, need.device, plan, host=need.host)


@dataclass(frozen=True)
class MemoryPlan:
    """A run as it will go on this machine now.

    Attributes:
        encode: of an image or a video, if the run starts from one.
        free: by device, what is free now and what can be made free. ram_weights: weights that are still on disk.
        instead: smaller videos that would fit, if this one does not.
    """

    geometry: Geometry
    batch: int
    text: Stage
    sampling: Sampling
    encode: Coding | None
    decode: Coding
    free: dict[str, dict[str, int]]
    ram_free: float
    ram_weights: float
    instead: tuple[Geometry, ...] = ()

    @property
    def frames_in_ram(self) -> float:
        """The decoded video, as ComfyUI keeps an IMAGE."""
        asked = self.geometry
        return self.batch * asked.frames * asked.height * asked.width * 3 * FP32

    @property
    def ram_needed(self) -> float:
        """At the most that decode or encode need; a CPU's own work counts too, because it is done there."""
        stages = [stage for _, stage in self.stages()]
        work = max(stage.host + (stage.peak if stage.device == "cpu" else 0) for stage in stages)
        return self.ram_weights + self.frames_in_ram + work

    @property
    def fits(self) -> bool:
        return all(stage.fits for _, stage in self.stages())

    def stages(self) -> Iterator[tuple[str, Stage]]:
        yield "text", self.text
        if self.encode:
            yield "encode", self.encode
        yield "sampling", self.sampling
        yield "decode", self.decode

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        asked = self.geometry
        return {
            "model": asked.spec.name, "width": asked.width, "height": asked.height, "length": asked.frames,
            "batch_size": self.batch, "fits": self.fits, "encode": None,
            **{name: stage.numbers() for name, stage in self.stages()},
            "devices": self.free,
            "ram": {"free": round(self.ram_free), "needed": round(self.ram_needed),
                    "weights_on_disk": round(self.ram_weights), "frames": round(self.frames_in_ram)},
            "instead": [{"width": g.width, "height": g.height, "length": g.frames} for g in self.instead],
            "words": self.words(),
        }

    def words(self) -> list[str]:
        """One line for each stage, the RAM, and the verdict."""
        asked = self.geometry
        lines = [f"CogVideoX {asked.spec.name}, {asked.frames} frames of {asked.width}x{asked.height}, batch "
                 f"{self.batch}"]
        lines += [f"{device}: {_gb(free['free'])} free, {_gb(free['obtainable'])} once other models have left"
                  for device, free in self.free.items()]
        lines += [f"{name}: {stage.words()}{_choice(stage)}" for name, stage in self.stages()]
        swap = "; the system may swap" if self.ram_needed > self.ram_free else ""
        lines.append(f"RAM: up to {_gb(self.ram_needed)} needed, {_gb(self.ram_free)} free{swap}")
        return [*lines, self._verdict()]

    def _verdict(self) -> str:
        missing = [name for name, stage in self.stages() if not stage.fits]
        if not missing:
            return "Everything fits."
        instead = " or ".join(f"{g.frames} frames of {g.width}x{g.height}" for g in self.instead)
        advice = f"By the estimate this would fit: {instead}." if instead else "No smaller video would fit either."
        return f"Does not fit: {', '.join(missing)}. {advice}"


def _choice(stage: Stage) -> str:
    if isinstance(stage, Sampling):
        return f"; {WORDS[str(stage.choice)]}" if stage.fits else "; more than there is"
    if isinstance(stage, Coding):
        if stage.fits:
            return f"; {stage.choice}" + (f", {_gb(stage.host)} of RAM" if stage.host else "")
        return "; more than there is" + ("" if stage.device == "cpu" else
                                         ", so tiles will be used, which change the picture slightly")
    return "" if stage.fits else "; more than there is"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"
