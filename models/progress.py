"""One progress bar over work that is made of parts, each of which would show a bar of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import comfy.utils


class Stretch:
    """``units`` of a whole's bar, for a part that counts to ``total``."""

    def __init__(self, whole: Whole, units: int, total: int) -> None:
        self._whole, self._units, self._total, self._value = whole, units, total, 0

    def update(self, value: int) -> None:
        self._value += value
        self._whole.show(self._units * min(self._value, self._total) // self._total)


class Whole:
    """A bar of ``total`` units, filled part after part."""

    def __init__(self, total: int) -> None:
        self._bar, self._total, self._done, self._shown = comfy.utils.ProgressBar(total), total, 0, 0

    def show(self, value: int, preview: Any = None) -> None:
        """``value`` units of the part that runs are done. It never goes back, also if the part begins again."""
        self._shown = max(self._shown, self._done + value)
        self._bar.update_absolute(self._shown, self._total, preview)

    @contextmanager
    def part(self, units: int) -> Iterator[None]:
        """What runs in here fills the next ``units``."""
        token = _running.set((self, units))
        try:
            yield
        finally:
            _running.reset(token)
        self._done += units
        self.show(0)


_running: ContextVar[tuple[Whole, int] | None] = ContextVar("cogx_progress", default=None)


def progress_bar(total: int) -> Any:
    """A bar that counts to ``total``: a stretch of the bar of the work that this is a part of, or one of its own."""
    running = _running.get()
    return comfy.utils.ProgressBar(total) if running is None else Stretch(*running, total)
