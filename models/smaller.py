"""Legal videos that are smaller than one that does not fit, the nearest first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .specs import Geometry


def shorter(asked: Geometry) -> Iterator[Geometry]:
    """Fewer frames at the same size, the most first."""
    step = asked.spec.frame_step
    for frames in range((asked.frames - 2) // step * step + 1, 1, -step):
        yield Geometry(asked.spec, asked.width, asked.height, frames)


def smaller(asked: Geometry) -> Iterator[Geometry]:
    """The same frames at smaller sizes of about the same aspect, the largest first."""
    if asked.spec.transformer.use_learned_positional_embeddings:  # they know one size
        return
    step = asked.spec.size_step
    for width in range(asked.width - step, 0, -step):
        height = max(round(asked.height * width / asked.width / step), 1) * step
        yield Geometry(asked.spec, width, height, asked.frames)


def nearest_fitting(asked: Geometry, fits: Callable[[Geometry], bool]) -> list[Geometry]:
    """The most frames at this size, and the largest size with these frames, of what fits."""
    found = (next(filter(fits, candidates), None) for candidates in (shorter(asked), smaller(asked)))
    return [geometry for geometry in found if geometry is not None]
