"""benchmarks/run.py on this device at tiny size: every contender and measure runs, and the table says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
TIMED = ("forward", "forward-1", "step", "overhead", "decode", "encode", "text")


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_tiny_table(tmp_path: Path, variant: str, rehearsal: bool) -> None:
    output = tmp_path / "table.md"
    measures = ("overhead", "decode") if rehearsal else TIMED
    done = subprocess.run([sys.executable, str(RUN), "--tiny", "--variants", variant, "--rounds", "1", "--repeat", "1",
                           "--steps", "2", "--measures", *measures, "--output", str(output)],
                          capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "failed" not in text, text
    rows = text.split("## Times")[1].splitlines()
    for contender in ("cogx", "diffusers", "core"):
        assert sum(f"| {contender} |" in row for row in rows) == len(measures)
    if not rehearsal:
        assert "| GPU | not used |" not in text
