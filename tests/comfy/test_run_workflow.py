"""The client of scripts/run_workflow.py: the README's run on the embedded model, and what it says of refusals."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cogx.scripts import run_workflow

PACK = Path(__file__).parents[2]
README = (PACK / "README.md").read_text(encoding="utf-8")


def ran(server, workflow: str, *arguments: str) -> int:
    return run_workflow.main([str(PACK / workflow), "--server", server.url, *arguments])


def test_the_long_video_of_the_readme(server, capsys, tmp_path, monkeypatch):
    """With 2 of its steps. What the nodes say of themselves is said here too."""
    command = re.search(r"run_workflow\.py (workflows/api/long_text_to_video\.json[^`]+)```", README)[1]
    workflow, *arguments = shlex.split(command.replace("\\\n", " "))
    monkeypatch.chdir(tmp_path)
    assert ran(server, workflow, *arguments, "--set", "CogXSampler.steps=2") == 0
    said = capsys.readouterr().err
    assert Path("long.mp4").stat().st_size > 1000
    assert re.search(r"^Prompt: \d+ of 32 tokens$", said, re.MULTILINE), said
    assert "cut to" not in said and "overview" not in said and "was trained on" not in said


def test_a_refusal_is_said_once(server, capsys):
    """ComfyUI repeats it for each of the inputs that were checked together."""
    settings = ["--set", "CogXLoadPipeline.pipeline=CogX-Demo", "--set", "CogXEmptyLatent.length=20"]
    assert ran(server, "workflows/api/text_to_video.json", *settings) == 1
    said = capsys.readouterr().err
    assert said.count("20 frames: CogVideoX 1.0 needs 8N+1") == 1
    assert re.search(r"\(node \d+\): .*: width, height, length - 20 frames", said), said


def test_a_failure_names_no_place_on_the_server(server, capsys):
    sizes = {"width": 96, "height": 64, "length": 17}
    settings = ["--set", "CogXLoadPipeline.pipeline=5B-I2V"]
    for name, value in sizes.items():
        settings += ["--set", f"CogXEmptyLatent.{name}={value}"]
    assert ran(server, "workflows/api/text_to_video.json", *settings) == 1
    said = capsys.readouterr().err
    assert re.search(r"\(node 5\) failed: SpecError: .*image-to-video model", said), said
