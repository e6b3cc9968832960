"""A finished video continued chunk by chunk: which frames each takes over, and how it is joined on. Pure torch.

A chunk is a video of the model's own length that begins with the last ``overlap`` frames of what there is. Frames are
[N, H, W, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.specs import VAE_TEMPORAL_RATIO, ModelSpec, SpecError, frames_problem, nearest_on_grid

if TYPE_CHECKING:  # the nodes check their inputs with this file before torch is wanted
    from torch import Tensor

MOST_SEED = 2**64
GB = 1e9


def extension_problem(length: int, overlap: int, *specs: ModelSpec) -> str | None:
    """Why chunks of these pixel frames are legal for none of ``specs``, with the nearest that are; None if they are.

    The overlap is encoded as a clip of its own, whose first latent frame holds one frame, and it ends with a token.
    """
    problem = frames_problem(length, *specs)
    if problem:
        return f"length: {problem}"
    step = min(spec.token_frames for spec in specs if frames_problem(length, spec) is None)
    if length <= step:
        return f"length {length}: expected a chunk with new frames; nearest: {2 * step + 1}."
    most = length - step
    if overlap > most:
        return f"overlap {overlap}: expected less than length {length}; nearest: {most}."
    low, high = nearest_on_grid(overlap, step, 1, minimum=1)
    if low != overlap:
        family = "1.5" if step == specs[-1].token_frames and specs[-1].is_v1_5 else "1.0"
        return f"overlap {overlap}: CogVideoX {family} needs {step}N+1 frames; nearest: {low} or {high}."
    return None


@dataclass(frozen=True)
class Extension:
    """``chunks`` of ``length`` pixel frames, each of which takes over ``overlap``.

    Raises:
        SpecError: they are not legal for the model.
    """

    spec: ModelSpec
    chunks: int
    length: int
    overlap: int

    def __post_init__(self) -> None:
        problem = extension_problem(self.length, self.overlap, self.spec)
        trained = self.spec.transformer.sample_frames
        if problem is None and self.spec.transformer.use_learned_positional_embeddings and self.length != trained:
            problem = (f"length {self.length}: {self.spec.name} has learned positions for {trained} frames only; set "
                       f"length {trained}.")
        if problem:
            raise SpecError(problem)

    @property
    def latent_overlap(self) -> int:
        return (self.overlap - 1) // VAE_TEMPORAL_RATIO + 1

    @property
    def new_frames(self) -> int:
        """Of a chunk."""
        return self.length - self.overlap

    def check_source(self, frames: int) -> None:
        """Raises:
            SpecError: the video has less frames than a chunk takes over.
        """
        if frames < self.overlap:
            nearest, _ = nearest_on_grid(frames, self.spec.token_frames, 1, minimum=1)
            raise SpecError(f"The video has {frames} frame{'s' if frames > 1 else ''}: expected at least the overlap "
                            f"of {self.overlap}. Set overlap to {nearest}, or give a longer video.")

    def check_ram(self, frames: int, frame_bytes: int, free: float) -> None:
        """frames: of the video that is extended. free: bytes of RAM, of which the system would promise more.

        Raises:
            SpecError: the whole video does not fit.
        """
        needed = (frames + self.chunks * self.new_frames) * frame_bytes
        fit = int(free // frame_bytes - frames) // self.new_frames
        if needed > free:
            remedy = f"Set chunks to {fit} or less" if fit > 0 else "Close other programs"
            raise SpecError(f"The whole video takes {needed / GB:.1f} GB of RAM: expected at most {free / GB:.1f} GB, "
                            f"which are free. {remedy}, or extend only the last frames and join the videos after.")

    def seed(self, seed: int, chunk: int) -> int:
        """Each chunk has noise of its own: the same noise again would bring the same motion again."""
        return (seed + chunk) % MOST_SEED


def faded(before: Tensor, after: Tensor) -> Tensor:
    """A cross-fade of two videos of the same frames: from mostly the first to mostly the second."""
    import torch

    weights = torch.linspace(0, 1, before.shape[0] + 2, dtype=torch.float32)[1:-1]
    return torch.lerp(before, after, weights.reshape(-1, 1, 1, 1).to(before))


def extend(frames: Tensor, plan: Extension, make: Callable[[int, Tensor], Tensor], match: str) -> Tensor:
    """The video with its chunks joined on: [N + chunks * new_frames, H, W, 3]. ``frames`` is not changed.

    Args:
        make: a chunk, [length, H, W, 3], from its number and the frames that it takes over.
        match: 'off', 'soft' or 'full': see colour.py.
    """
    import torch

    from .colour import correction

    end, overlap = frames.shape[0], plan.overlap
    plan.check_source(end)
    # All of it at once, so that none of it is ever held twice.
    video = torch.empty((end + plan.chunks * plan.new_frames, *frames.shape[1:]), dtype=frames.dtype)
    video[:end] = frames
    for chunk in range(plan.chunks):
        last = video[end - overlap:end]
        made = make(chunk, last).to(video)
        change = correction(made[:overlap], last, match)
        if change is not None:
            change.apply_(made)
        last.copy_(faded(last, made[:overlap]))
        video[end:end + plan.new_frames] = made[overlap:]
        end += plan.new_frames
    return video
