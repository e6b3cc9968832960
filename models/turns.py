"""Prompts in turn: entries of a CONDITIONING that belong to successive parts of a video, one after the other.

An entry says so in its options: ``TURN``: (index, count). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .specs import SpecError

TURN = "cogx_turn"

Turn = tuple[int, int]


def prompts_of(text: str) -> list[str]:
    """One prompt per line; empty lines are left out.

    Raises:
        SpecError: there is none.
    """
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise SpecError("text: expected a prompt on each line, got none. Write at least one.")
    return prompts


def sequences(turns: Sequence[Turn | None]) -> list[list[int]]:
    """Which entries are one sequence, as their places in the CONDITIONING; an entry without a turn is one of its own.

    A sequence ends where the index does not rise: nodes that combine conditionings put them one after the other.
    """
    found: list[list[int]] = []
    last: Turn | None = None
    for place, turn in enumerate(turns):
        if turn is None or last is None or turn[1] != last[1] or turn[0] <= last[0]:
            found.append([])
        found[-1].append(place)
        last = turn
    return found


def first_of_each(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is left for a network that sees the whole video at once: of each sequence its first entry."""
    return [entries[places[0]] for places in sequences([entry.get(TURN) for entry in entries])]
