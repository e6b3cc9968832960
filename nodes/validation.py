"""What ``validate_inputs`` of several nodes share. A named input loses core's own list and range checks."""

from __future__ import annotations

from collections.abc import Callable

from ..models.specs import SpecError


def problem_of(check: Callable[[], object]) -> bool | str:
    """True if ``check`` passes, else the words of its SpecError: what ComfyUI's validation wants."""
    try:
        check()
    except SpecError as error:
        return str(error)
    return True


def check_choice(name: str, value: str | None, choices: tuple[str, ...] | list[str]) -> None:
    """Raises SpecError unless ``value`` is one of ``choices``; None is an input that is connected."""
    if value is not None and value not in choices:
        raise SpecError(f"{name} {value!r}: expected one of {list(choices)}.")


def check_range(name: str, value: int | None, low: int, high: int) -> None:
    """Raises SpecError unless ``value`` is a number in the range; None is an input that is connected."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(f"{name} {value!r}: expected a whole number from {low} to {high}.")
    if not low <= value <= high:
        raise SpecError(f"{name} {value}: expected {low} to {high}; nearest: {min(max(value, low), high)}.")
