"""Plans for the VAE: how high its strips are, where its values live, and how much memory that takes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..specs import VAESpec

LATENT_CHUNK = 2
PIXEL_CHUNK = 8
# Latent frames in front of a loop's first. Each layer looks back two frames, 43 latent frames in all at the published
# depth, but what is that far away hardly counts: on the embedded model, where the video cuts to another at the loop's
# seam, what 4 leave out changes a value by 1.7 steps of 8 bit, 6 by 0.14, 8 by 0.09.
LOOP_LEAD = 8
HISTORY = 2  # frames that a causal convolution sees before the current one

DEVICE, PARKED, HOST = "device", "parked", "host"

MIN_ROWS = 8  # one latent row
FP32 = 4  # bytes; statistics are taken of values in fp32


@dataclass(frozen=True)
class Plan:
    """How a video is decoded or encoded. Every plan gives the same picture, but for rounding.

    Attributes:
        rows: height of a strip at full size, in pixels; None does not split.
        host_caches: the causal convolutions' caches are in host memory.
        values: where the values of a chunk are. 'device'; 'parked': what a residual block adds at its end waits in
            host memory at full size; 'host': all of it, the device holds strips only.
    """

    rows: int | None = None
    host_caches: bool = False
    values: str = DEVICE

    def __str__(self) -> str:
        strips = "without strips" if self.rows is None else f"strips of {self.rows} rows"
        places = {DEVICE: [], PARKED: ["residuals"], HOST: ["values"]}[self.values]
        places += ["caches"] if self.host_caches else []
        return f"{strips}, {' and '.join(places)} in host memory" if places else f"{strips}, all on the device"


UNSPLIT = Plan()
SMALLEST = Plan(MIN_ROWS, True, HOST)


@dataclass(frozen=True)
class Memory:
    """Bytes that a plan takes at its peak, weights not counted."""

    device: float
    host: float


def chunk_bounds(frames: int, size: int) -> list[tuple[int, int]]:
    """The reference's chunks: ``size`` frames each, the remainder joining the first."""
    first = frames % size + (size if frames >= size else 0)
    return [(0, first)] + [(start, start + size) for start in range(first, frames, size)]


def lead_of_loop(frames: int) -> int:
    """How many of its last latent frames a video of ``frames`` that loops is decoded with in front of its first.

    With them the number is even, so that every chunk has two and every latent frame gives four.
    """
    return LOOP_LEAD + frames % 2


def decoded_frames(latents: int) -> int:
    """Pixel frames of latent frames: an even count gives 4T, because the first frame then has a partner."""
    return 4 * latents - 3 * (latents % 2)


def shrunk_frames(frames: int, time: bool) -> int:
    """Frames after downsampling: an odd chunk's first one stays alone."""
    return frames if not time or frames == 1 else frames // 2 + frames % 2


def grown_frames(frames: int, time: bool) -> int:
    """Frames after upsampling."""
    return frames if not time or frames == 1 else 2 * frames - frames % 2


@dataclass(frozen=True)
class Level:
    """A resolution: channels that come in, channels of its blocks, frames, rows and columns of a chunk."""

    before: int
    channels: int
    frames: int
    rows: int
    width: int

    @property
    def shortcut(self) -> bool:
        return self.before != self.channels

    @property
    def room(self) -> int:
        """Channels of all its fields: its input, the inside of a block, and the spare one."""
        return self.before + self.channels * (1 + self.shortcut)

    @property
    def hosted(self) -> int:
        """The same in host memory, where a smaller spare field lies over the input."""
        return self.before + self.channels * (1 + (self.channels > self.before))

    @property
    def positions(self) -> int:
        return self.frames * self.rows * self.width


def decoder_levels(spec: VAESpec, frames: int, rows: int, width: int) -> list[Level]:
    """The levels of a chunk of latent size, smallest first."""
    levels = []
    before = spec.block_out_channels[-1]
    for i, channels in enumerate(spec.block_out_channels[::-1]):
        if i:
            frames, rows, width = grown_frames(frames, i <= _time_levels(spec)), 2 * rows, 2 * width
        levels.append(Level(before, channels, frames, rows, width))
        before = channels
    return levels


def encoder_levels(spec: VAESpec, frames: int, rows: int, width: int) -> list[Level]:
    """The levels of a chunk of pixels, largest first."""
    levels = []
    before = spec.block_out_channels[0]
    for i, channels in enumerate(spec.block_out_channels):
        if i:
            frames, rows, width = shrunk_frames(frames, i <= _time_levels(spec)), rows // 2, width // 2
        levels.append(Level(before, channels, frames, rows, width))
        before = channels
    return levels


def _time_levels(spec: VAESpec) -> int:
    return spec.temporal_compression_ratio.bit_length() - 1


@dataclass(frozen=True)
class Step:
    """What a level of a chunk needs, in bytes: for its fields, on the device or in host memory, for its widest strip,
    and what its convolutions remember."""

    fields: int
    hosted: int
    strip: float
    cached: int


def decode_memory(spec: VAESpec, latent: tuple[int, int, int], value: int, plan: Plan) -> Memory:
    """Memory of an exact decode. latent: frames, rows, columns. value: bytes of a value."""
    bounds = chunk_bounds(latent[0], LATENT_CHUNK)
    strips = Strips(plan, value, latent[2] * spec.spatial_ratio, history=0 if latent[0] == 1 else HISTORY)

    def steps(frames: int) -> list[Step]:
        levels = decoder_levels(spec, frames, *latent[1:])
        last, found = levels[-1], []
        arena = last.positions * (last.channels if plan.values == PARKED else max(last.before, 2 * last.channels))
        for i, level in enumerate(levels):
            below = levels[i - 1] if i else None
            fields = below.positions * below.channels if below and level is not last else 0
            if i < len(levels) - 2 or plan.values == HOST:
                fields += level.positions * level.room
            else:  # the last but one lives in the memory of the last, but for what comes in if that is wider
                fields += arena + (level.positions * level.before if level.shortcut and level is not last else 0)
            strip = strips.normed(level, latent, level is last and plan.values == PARKED)
            if below:
                strip = max(strip, strips.grown(below, level))
            ends = 4 * level.channels if not i else level.channels if level is last else 0
            cached = strips.cached(level, spec.layers_per_block + 1, ends)
            found.append(Step(fields * value, level.positions * level.hosted * value, strip, cached))
        return found

    last = decoder_levels(spec, bounds[0][1], *latent[1:])[-1]
    pixels = last.positions * spec.out_channels * value * min(len(bounds), 2)
    host = last.positions * max(last.before if last.shortcut else 0, last.channels) * value
    return _memory(steps, bounds, pixels, host, plan)


def encode_memory(spec: VAESpec, pixels: tuple[int, int, int], value: int, plan: Plan) -> Memory:
    """Memory of an exact encode. pixels: frames, rows, columns. value: bytes of a value."""
    bounds = chunk_bounds(pixels[0], PIXEL_CHUNK)
    strips = Strips(plan, value, pixels[2], history=0 if pixels[0] == 1 else HISTORY)

    def steps(frames: int) -> list[Step]:
        levels, found = encoder_levels(spec, frames, *pixels[1:]), []
        for i, level in enumerate(levels):
            fields = level.positions * (level.channels if not i and plan.values == PARKED else level.room)
            strip = strips.normed(level, parks=not i and plan.values == PARKED)
            if i:  # while it shrinks, both are there
                above = levels[i - 1]
                fields = max(fields, above.positions * above.channels + level.positions * level.before)
                strip = max(strip, strips.shrunk(above, level))
            cached = strips.cached(level, spec.layers_per_block, 5 * level.channels if level is levels[-1] else 0)
            found.append(Step(fields * value, level.positions * level.hosted * value, strip, cached))
        return found

    first = encoder_levels(spec, bounds[0][1], *pixels[1:])[0]
    chunk = first.positions * spec.in_channels * value
    return _memory(steps, bounds, chunk, first.positions * first.channels * value, plan)


def _memory(steps: Callable[[int], list[Step]], bounds: list[tuple[int, int]], ends: float, parked: int,
            plan: Plan) -> Memory:
    """The largest need of the first chunk, which fills the caches, one between, and the last, which empties them.

    ends: bytes of the pixels of a chunk. parked: of what parking puts into host memory; else all fields go there.
    """
    peak, caches, filled, last = 0.0, 0, 0, len(bounds) - 1
    hosted = sum(step.hosted for step in steps(bounds[0][1]))
    for i in sorted({0, min(1, last), last}):
        for step in steps(bounds[i][1] - bounds[i][0]):
            caches += step.cached if i == 0 != last else 0
            filled = max(filled, caches)
            there = (0 if plan.values == HOST else step.fields) + (0 if plan.host_caches else caches)
            peak = max(peak, there + step.strip)
            caches -= step.cached if i == last != 0 else 0
    host = filled if plan.host_caches else 0
    return Memory(peak + ends, host + {DEVICE: 0, PARKED: parked, HOST: hosted}[plan.values])


@dataclass(frozen=True)
class Strips:
    """Bytes of the strips at work under a plan. width: of the video; history: frames before those of the chunk."""

    plan: Plan
    value: int
    width: int
    history: int

    def rows(self, level: Level) -> int:
        if self.plan.rows is None:
            return level.rows
        return min(level.rows, self.plan.rows * (self.width // level.width))

    def cached(self, level: Level, blocks: int, ends: int) -> int:
        """What the convolutions of a level remember. ends: channels of those outside its blocks."""
        channels = level.before + (2 * blocks - 1) * level.channels + ends
        return self.history * level.rows * level.width * channels * self.value

    def normed(self, level: Level, latent: tuple[int, int, int] | None = None, parks: bool = False) -> float:
        """The residual blocks. latent: frames, rows, columns of what modulates the norm. parks: the residuals."""
        first = self._convolution(level, level.before, latent, parks, residual=False)
        return max(first, self._convolution(level, level.channels, latent, parks, residual=True))

    def _convolution(self, level: Level, c_in: int, latent: tuple[int, int, int] | None, parks: bool,
                     residual: bool) -> float:
        """A normalised convolution. Three moments: the window is filled, it is convolved, its statistics are taken.
        What comes from host memory is one strip ahead."""
        rows, row, hosted = self.rows(level), level.width * self.value, self.plan.values == HOST
        window = c_in * (level.frames + self.history) * (rows + 2) * row
        carried = c_in * (level.frames + self.history) * 2 * row if rows < level.rows else 0
        raw, out = c_in * level.frames * rows * row, level.channels * level.frames * rows * row
        fetched = raw if hosted or (parks and level.shortcut and not residual) else 0
        cached = c_in * self.history * rows * row if self.plan.host_caches else 0
        beside = cached
        if latent:
            scale = level.width // latent[2]
            maps = 2 * c_in * min(latent[0], LATENT_CHUNK + 1) * -(-rows // scale) * latent[2] * FP32
            beside = max(beside, maps * (1 + scale if scale > 1 else 1))
        if parks and not residual:  # what waits is made, and a copy of it leaves
            beside = max(beside, 2 * out)
        ahead = 0
        if hosted or rows < level.rows:
            ahead = cached + fetched + (out if residual and (hosted or parks) else 0)
        return carried + ahead + max(window + fetched + beside, window + out,
                                     out + max(self._fp32(out), out if hosted else 0))

    def grown(self, below: Level, level: Level) -> float:
        """The upsampling of ``below`` to ``level``."""
        rows, row = self.rows(level), level.width * self.value
        window = below.channels * below.frames * (rows + 2) * row
        out, chosen = below.channels * below.frames * rows * row, below.channels * level.frames * rows * row
        ahead = out // 4 if self.plan.values == HOST else 0
        return ahead + max(window + out, out + chosen, chosen + self._fp32(chosen))

    def shrunk(self, above: Level, level: Level) -> float:
        """The downsampling of ``above`` to ``level``."""
        rows = self.rows(above)
        window = above.channels * level.frames * (rows + 2) * (above.width + 1) * self.value
        out = above.channels * level.frames * -(-rows // 2) * level.width * self.value
        ahead = 2 * above.channels * above.frames * rows * above.width * self.value if self.plan.values == HOST else 0
        return ahead + max(window + out, 2 * out, out + self._fp32(out))

    def _fp32(self, values: int) -> int:
        return values // self.value * FP32 if self.value < FP32 else 0


@dataclass(frozen=True)
class Budget:
    """Free memory in bytes. free: of the device now; host: of the RAM; others: what other models hold on the device,
    which they take to the RAM when they leave.

    unified: the device's memory is the RAM, as on a CPU, and nothing is gained by going there.
    """

    free: float
    host: float = 0.0
    others: float = 0.0
    unified: bool = False


STRIP_ROWS = (64, 32, 16, 8)  # higher strips need more memory and are not faster
# torch takes oneDNN for a 3-D convolution on a CPU only above this many values in a column of the input (channels x
# frames x rows), and else a path that is three to five times slower.
ONEDNN_VALUES = 20480
CPU_ROWS = 32


def cpu_plan(spec: VAESpec, frames: int) -> Plan:
    """The fastest plan on a CPU: strips stay in its caches. frames: of the first chunk, in pixels."""
    enough = -(-ONEDNN_VALUES // (spec.block_out_channels[0] * max(frames, 1)))
    return Plan(-(-max(CPU_ROWS, enough) // MIN_ROWS) * MIN_ROWS)


def choose(memory: Callable[[Plan], Memory], budget: Budget, on_cpu: Plan) -> Plan | None:
    """The fastest plan that fits, or None.

    Caches on the device are faster than caches in host memory, and both hardly slower than no limit: they are tried
    in the free memory first, and then in what there is without other models. What moves more through the host is
    tried last.
    """
    if budget.unified:
        lower = [Plan(rows) for rows in STRIP_ROWS if rows < (on_cpu.rows or 0)]
        return next((plan for plan in (on_cpu, *lower) if memory(plan).device <= budget.free), None)
    fast = [Plan(rows, host_caches) for host_caches in (False, True) for rows in STRIP_ROWS]
    slow = [Plan(rows, True, values) for values in (PARKED, HOST) for rows in STRIP_ROWS]
    for plans, moved in ((fast, 0.0), (fast, budget.others), (slow, budget.others)):
        for plan in plans:
            need = memory(plan)
            if need.device <= budget.free + moved and (not need.host or need.host + moved <= budget.host):
                return plan
    return None


def smaller_plans(plan: Plan) -> Iterator[Plan]:
    """What is left to try when a plan does not fit after all: each takes less memory than the one before."""
    rows = 2 * STRIP_ROWS[0] if plan.rows is None else plan.rows
    while rows > MIN_ROWS:
        rows = max(rows // 2 // MIN_ROWS, 1) * MIN_ROWS
        yield replace(plan, rows=rows)
    plan = replace(plan, rows=MIN_ROWS)
    if not plan.host_caches:
        plan = replace(plan, host_caches=True)
        yield plan
    for values in (PARKED, HOST)[(DEVICE, PARKED, HOST).index(plan.values):]:
        yield replace(plan, values=values)
