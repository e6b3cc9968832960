"""The table: plain Markdown, from the results of all rounds. Pure Python."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30
NOTHING = "-"


@dataclass
class Cell:
    """What all rounds found for one (variant, measure, contender)."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    weights: int = 0
    work: float = 0.0
    note: str = ""
    problem: str = ""

    def add(self, found: Mapping[str, Any]) -> None:
        """One more round: all its seconds, the larger peak, and for the rest what it says."""
        self.seconds += found.get("seconds", [])
        peaks = [peak for peak in (self.peak, found.get("peak")) if peak is not None]
        self.peak = max(peaks, default=None)
        for key in ("weights", "work", "note", "problem"):
            setattr(self, key, found.get(key, getattr(self, key)))


def processor() -> str:
    """The CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text(errors="replace").splitlines()
             if line.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str:
    """Version of the NVIDIA driver; 'none' without one."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                           capture_output=True, text=True, check=False)
    return asked.stdout.split("\n")[0].strip() or "none"


def seconds_text(value: float) -> str:
    """Three digits, in the unit that suits."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def gib(value: int | None) -> str:
    return NOTHING if value is None else f"{value / GIB:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)]


def time_row(title: str, contender: str, cell: Cell) -> list[str]:
    if not cell.seconds:
        return [title, contender, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, cell.problem]
    median = statistics.median(cell.seconds)
    rate = f"{cell.work / median / 1e12:.3g}" if cell.work else NOTHING
    spread = f"{seconds_text(min(cell.seconds))} to {seconds_text(max(cell.seconds))}"
    return [title, contender, seconds_text(median), spread, str(len(cell.seconds)), gib(cell.peak),
            gib(cell.weights), rate, cell.note]


def live_row(title: str, contender: str, cell: Cell) -> list[str]:
    return [title, contender, gib(cell.peak), gib(cell.weights), cell.problem or cell.note]


TIME_HEAD = ("what", "contender", "median", "from to", "n", "peak GiB", "of it weights", "TFLOP/s", "how")
LIVE_HEAD = ("what", "contender", "peak live GiB", "weights GiB, not in it", "where")

EXPLANATION = """\
Weights are random; times do not depend on them. Each contender ran in a process of its own, one after the other, in \
alternating order. "n" counts timed calls, after one that is not; a step is timed from the end of the one before. Peak \
GiB is what torch had allocated, weights included. TFLOP/s counts linear layers and attention."""

LIVE_EXPLANATION = """\
Peak live memory is accounted on the meta device: tensors alive at once at full size, without weights and inputs, \
without workspaces inside kernels, and with fused attention and RoPE, as on a CUDA device. Nothing is computed."""


@dataclass(frozen=True)
class Section:
    """One kind of table, with a part for every variant: (words, rows)."""

    title: str
    explanation: str
    head: Sequence[str]
    parts: Sequence[tuple[str, Sequence[Sequence[str]]]]


def document(header: Mapping[str, str], sections: Sequence[Section]) -> str:
    lines = ["# Benchmark", "", *table(("", ""), header.items()), ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.explanation, ""]
        for words, rows in section.parts:
            lines += [f"### {words}", "", *table(section.head, rows), ""]
    return "\n".join(lines)


def host_words() -> str:
    """The machine beside its GPU."""
    memory = ""
    if hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB"
    return f"{processor()}, {os.cpu_count()} threads{memory}"
