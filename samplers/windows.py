"""A long video in windows: which frames each window has, with what weight it counts, and the noise that they share.

Pure. Tokens are what the network sees of time: one latent frame for CogVideoX 1.0, two for 1.5.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..models.specs import ModelSpec, SpecError, frames_problem, nearest_on_grid
from ..models.turns import Turn
from .prompts import mix

INDEPENDENT, FREENOISE, REPEATED = NOISES = ("independent", "freenoise", "repeated")
WINDOW, GLOBAL = POSITIONS = ("window", "global")
UNIFORM, LOOPED, COARSE = "uniform", "looped", "coarse"
COARSE_TIMESTEP = 400  # of 1000: from here up 'coarse' lays the video out


def halving(step: int) -> float:
    """The van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ... ComfyUI's ``ordered_halving``."""
    value, share = 0.0, 0.5
    while step:
        value, step, share = value + share * (step & 1), step >> 1, share / 2
    return value


def _between(starts: Sequence[int], total: int, length: int) -> list[list[int]]:
    """Windows at ``starts``, moved to where they lie inside the video; each once."""
    inside = dict.fromkeys(min(max(start, 0), total - length) for start in starts)
    return [list(range(start, start + length)) for start in inside]


def _static(total: int, length: int, overlap: int, step: int) -> list[list[int]]:
    return _between(range(0, total - overlap, length - overlap), total, length)


def _uniform(total: int, length: int, overlap: int, step: int) -> list[list[int]]:
    """As static, moved on at each step by another part of the stride, so that no border stays where it is."""
    stride = length - overlap
    return _between(range(-round(stride * halving(step)), total - overlap, stride), total, length)


def _looped(total: int, length: int, overlap: int, step: int) -> list[list[int]]:
    """As ComfyUI's looped schedule with a closed loop: windows go on over the end into the beginning."""
    first = round(total * halving(step))
    return [[frame % total for frame in range(start, start + length)]
            for start in range(first, first + total, length - overlap)]


def _batched(total: int, length: int, overlap: int, step: int) -> list[list[int]]:
    """Side by side. The last one is moved back instead of being cut: it keeps the length the model was trained on."""
    return _between(range(0, total, length), total, length)


_SCHEDULES: dict[str, Callable[[int, int, int, int], list[list[int]]]] = {
    "static": _static, UNIFORM: _uniform, LOOPED: _looped, "batched": _batched, COARSE: _static}
SCHEDULES = tuple(_SCHEDULES)


def plan(total: int, length: int, overlap: int, schedule: str, step: int = 0) -> list[list[int]]:
    """The windows over ``total`` tokens at a step: each a list of ``length`` tokens, or one of all if they fit.

    ``overlap`` is less than ``length``. The one of a closed loop begins elsewhere at each step, so that none of the
    frames is always the first: the latent shift of Mobius (Bi 2025).
    """
    if total <= length:
        first = round(total * halving(step)) if schedule == LOOPED else 0
        return [[(first + token) % total for token in range(total)]]
    return _SCHEDULES[schedule](total, length, overlap, step)


def spread(total: int, length: int) -> list[int]:
    """A window of ``length`` of ``total`` tokens, evenly over the whole video, its first and its last among them."""
    return [round(i * (total - 1) / max(length - 1, 1)) for i in range(length)]


def between(tokens: Sequence[int], total: int) -> list[tuple[int, int, float]]:
    """For each token of a video the places in ``tokens``, which rise from 0, of the two around it, and the share of the
    second."""
    found = []
    for token in range(total):
        after = bisect_right(tokens, token)
        first, second = after - 1, min(after, len(tokens) - 1)
        gap = tokens[second] - tokens[first]
        found.append((first, second, (token - tokens[first]) / gap if gap else 0.0))
    return found


def _pyramid(window: Sequence[int], total: int, overlap: int, closed: bool) -> list[float]:
    """FreeNoise (Qiu 2023): by the distance from the nearer end."""
    return [float(min(i, len(window) - 1 - i) + 1) for i in range(len(window))]


def _linear(window: Sequence[int], total: int, overlap: int, closed: bool) -> list[float]:
    """A cross-fade over the overlap, none at the video's ends. No weight is 0, unlike in ComfyUI's."""
    weights = [1.0] * len(window)
    for i in range(min(overlap, len(window))):
        share = (i + 1) / (overlap + 1)
        if closed or window[0] != 0:
            weights[i] = min(weights[i], share)
        if closed or window[-1] != total - 1:
            weights[-1 - i] = min(weights[-1 - i], share)
    return weights


def _flat(window: Sequence[int], total: int, overlap: int, closed: bool) -> list[float]:
    return [1.0] * len(window)


def _relative(window: Sequence[int], total: int, overlap: int, closed: bool) -> list[float]:
    """ComfyUI's 'relative': by the distance from the middle, at least 1/100."""
    middle = (len(window) - 1) / 2
    return [max(0.01, 1 - abs(i - middle) / (middle + 0.005)) for i in range(len(window))]


_FUSES: dict[str, Callable[[Sequence[int], int, int, bool], list[float]]] = {
    "pyramid": _pyramid, "linear": _linear, "flat": _flat, "relative": _relative}
FUSES = tuple(_FUSES)


def weights(window: Sequence[int], total: int, overlap: int, fuse: str, closed: bool = False) -> list[float]:
    """How much each frame of a window counts, above 0; where windows meet, their sum is divided by that of these.

    ``total``, ``overlap`` and the entries of ``window`` are in one unit. ``closed``: the video's ends meet.
    """
    return _FUSES[fuse](window, total, overlap, closed)


def noise_order(total: int, length: int, overlap: int, noise: str, seed: int) -> list[int]:
    """Which frame's noise each of ``total`` frames gets.

    'freenoise': FreeNoise (Qiu 2023), as ComfyUI does it. The noise of the first window goes on, shuffled
    in parts of a stride, so that static windows each hold the same noise in another order. 'repeated': the noise of
    the first window again and again.
    """
    order = list(range(total))
    if noise == REPEATED:
        return [frame % length for frame in order]
    if noise == FREENOISE:
        import torch

        generator = torch.Generator("cpu").manual_seed(seed)
        stride = length - overlap
        for start in range(0, total - length, stride):
            count = min(stride, total - length - start)
            shuffled = torch.randperm(count, generator=generator).tolist()
            order[start + length:start + length + count] = [order[start + i] for i in shuffled]
    return order


def window_problem(length: int, overlap: int, *specs: ModelSpec) -> str | None:
    """Why windows of these pixel frames are legal for none of ``specs``, with the nearest that are; None if they are.

    Windows have legal video lengths; the overlap is a number of whole tokens.
    """
    problem = frames_problem(length, *specs)
    if problem:
        return f"length: {problem}"
    step = min(spec.token_frames for spec in specs if frames_problem(length, spec) is None)
    if overlap >= length:  # legal lengths are whole tokens and 1
        return f"overlap {overlap}: expected less than length {length}; nearest: {length - 1}."
    low, high = nearest_on_grid(overlap, step)
    if low != overlap:
        family = "1.5" if step == specs[-1].token_frames and specs[-1].is_v1_5 else "1.0"
        return f"overlap {overlap}: CogVideoX {family} needs a multiple of {step} frames; nearest: {low} or {high}."
    return None


def runs_within(window: Sequence[int], first: int, count: int) -> list[tuple[int, int]]:
    """Where the frames ``first`` to ``first + count - 1`` are in a window: the start and the length of each run."""
    inside = [place for place, frame in enumerate(window) if first <= frame < first + count]
    starts = [place for place in inside if place - 1 not in inside]
    ends = [place for place in inside if place + 1 not in inside]
    return [(start, end - start + 1) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Windows:
    """How a MODEL is to see a long video. ``length`` and ``overlap`` are in pixel frames."""

    spec: ModelSpec
    length: int
    overlap: int
    schedule: str
    fuse: str
    noise: str
    anchor: bool
    positions: str

    def __post_init__(self) -> None:
        problem = window_problem(self.length, self.overlap, self.spec) or self._problem_of_positions()
        if problem:
            raise SpecError(problem)

    def _problem_of_positions(self) -> str | None:
        network = self.spec.transformer
        if not network.use_learned_positional_embeddings:
            return None
        if self.length != network.sample_frames:
            return (f"length {self.length}: {self.spec.name} has learned positions for {network.sample_frames} frames "
                    f"only; set length {network.sample_frames}.")
        if self.positions == GLOBAL:
            return (f"positions global: {self.spec.name} has learned positions for one window of "
                    f"{network.sample_frames} frames only; set positions to window.")
        return None

    def unusual_length(self) -> str | None:
        """Why the model was not trained on windows of this length; None if it was."""
        native, most = self.spec.transformer.sample_frames, self.spec.max_frames
        if native <= self.length <= most:
            return None
        trained = f"{native} frames" if native == most else f"{native} to {most} frames"
        return f"windows of {self.length} frames: CogVideoX {self.spec.name} was trained on {trained}."

    @property
    def latent_frames(self) -> int:
        """Of a window, 1.5's padding frames included: 81 pixel frames are 22."""
        return ((self.length - 1) // self.spec.token_frames + 1) * self.spec.transformer.temporal_patch

    @property
    def latent_overlap(self) -> int:
        return self.overlap // self.spec.token_frames * self.spec.transformer.temporal_patch

    @property
    def closed(self) -> bool:
        """The video's end goes over into its beginning."""
        return self.schedule == LOOPED

    @property
    def moves(self) -> bool:
        """The windows lie elsewhere at each step."""
        return self.schedule in (UNIFORM, LOOPED)

    def apply_to(self, total: int) -> bool:
        """Whether ``total`` latent frames are seen otherwise than without windows."""
        return self.closed or total > self.latent_frames

    def at(self, total: int, step: int) -> list[list[int]]:
        """The windows over ``total`` latent frames, padding frames included, as latent frames. Tokens stay whole."""
        patch = self.spec.transformer.temporal_patch
        tokens = plan(total // patch, self.latent_frames // patch, self.latent_overlap // patch, self.schedule, step)
        return [[token * patch + i for token in window for i in range(patch)] for window in tokens]

    def lays_out(self, total: int, timestep: float = COARSE_TIMESTEP) -> bool:
        """Whether one window over all ``total`` latent frames is seen at this noise, instead of those of ``at``."""
        return self.schedule == COARSE and timestep >= COARSE_TIMESTEP and total > self.latent_frames

    def overview(self, total: int) -> list[int]:
        """That window: latent frames. Tokens stay whole."""
        patch = self.spec.transformer.temporal_patch
        return [token * patch + i for token in spread(total // patch, self.latent_frames // patch)
                for i in range(patch)]

    def around(self, total: int) -> list[tuple[int, int, float]]:
        """For each of ``total`` latent frames the places in the ``overview`` of the two around it, and the share of the
        second."""
        patch = self.spec.transformer.temporal_patch
        tokens = between(spread(total // patch, self.latent_frames // patch), total // patch)
        return [(first * patch + i, second * patch + i, share) for first, second, share in tokens for i in range(patch)]

    def weights_of(self, window: Sequence[int], total: int) -> list[float]:
        return weights(window, total, self.latent_overlap, self.fuse, self.closed)

    def noise_of(self, total: int, seed: int) -> list[int]:
        return noise_order(total, self.latent_frames, self.latent_overlap, self.noise, seed)

    def prompts_of(self, turns: Sequence[Turn], window: Sequence[int], total: int) -> tuple[int, int, float]:
        """As ``mix``, for the middle of a window; a cross-fade takes as long as the overlap."""
        middle = (window[0] + len(window) / 2) % total
        return mix(turns, middle / total, self.latent_overlap / total, self.closed)

    def unseen(self, turns: Sequence[Turn], total: int, steps: int) -> list[int]:
        """Which prompts of a sequence count most in no window of a run, by their place in ``turns``."""
        found = (self.prompts_of(turns, window, total) for step in range(steps) for window in self.at(total, step))
        return sorted(set(range(len(turns))) - {b if share >= 0.5 else a for a, b, share in found})
