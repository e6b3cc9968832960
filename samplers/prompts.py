"""A prompt for each part of a video: which one counts when, and how one goes over into the next. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..models.turns import TURN, Turn, sequences


def in_turn(conditioning: Sequence[Sequence[Any]]) -> list[list[list[Any]]]:
    """A CONDITIONING of a sequence as one CONDITIONING for each of its prompts, without the marks.

    Entries that are no part of a sequence are in each. Of several sequences (in areas, for example) each gives its
    own; a shorter one goes on with its last. One that holds no sequence comes back as the only one.
    """
    groups = sequences([options.get(TURN) for _, options in conditioning])
    return [[_unmarked(conditioning[places[min(turn, len(places) - 1)]]) for places in groups]
            for turn in range(max(map(len, groups), default=1))]


def _unmarked(entry: Sequence[Any]) -> list[Any]:
    embedding, options = entry
    return [embedding, {key: value for key, value in options.items() if key != TURN}]


def mix(turns: Sequence[Turn], time: float, fade: float, closed: bool = False) -> tuple[int, int, float]:
    """Which two entries of a sequence a moment lies between, by their place in ``turns``, and the share of the second.

    Each of N prompts has an Nth of the video, and goes over into the next around the border between them.

    Args:
        turns: of the entries, rising.
        time: the moment, 0 to 1 of the video.
        fade: how long a cross-fade takes, as a part of the video; at most the part of one prompt.
        closed: the last prompt goes over into the first, where the video's ends meet.
    """
    count = turns[0][1]
    fade, last = min(fade, 1 / count), len(turns) - 1
    if closed and min(time, 1 - time) < fade / 2:
        return last, 0, _ramp(time if time < 0.5 else time - 1, fade)
    for place, (one, other) in enumerate(pairwise(turns)):
        border = (one[0] + 1 + other[0]) / (2 * count)
        if time < border + fade / 2:
            return place, place + 1, _ramp(time - border, fade)
    return last, last, 0.0


def _ramp(distance: float, fade: float) -> float:
    """From 0 to 1, ``fade`` long, around 0."""
    return float(distance >= 0) if abs(distance) >= fade / 2 else 0.5 + distance / fade
