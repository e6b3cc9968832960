"""The command line: asks what this machine has, runs every contender in a process of its own, writes the table."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.specs import PUBLISHED
from . import report
from .contenders import CONTENDERS
from .measure import MEASURES, Plan, gpu_words, run_measure, versions
from .report import Cell
from .setting import DTYPES, NotMeasured, make_setting

RUN = Path(__file__).with_name("run.py")
COMPILED = "diffusers-compiled"
CONTENDER_NAMES = tuple(name for name in CONTENDERS if name != COMPILED)

NEEDS_COMFYUI = frozenset({"cogx", "core"})
COMPILED_MEASURES = frozenset({"forward", "forward-1", "step"})

ACCOUNTED = tuple(name for name, measure in MEASURES.items() if measure.accounted)
TIMED = tuple(name for name in MEASURES if name not in ACCOUNTED)
# A CPU tells nothing about seconds of matrix products and convolutions.
ON_CPU = ("overhead", *ACCOUNTED)

Cells = dict[tuple[str, str, str], Cell]


@dataclass(frozen=True)
class Job:
    """What one process does: some measures of one contender and variant."""

    contender: str
    variant: str
    measures: tuple[str, ...]
    dtype: str
    tiny: bool
    cpu: bool
    repeat: int
    steps: int
    sampler: str


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Times this pack, diffusers and ComfyUI core on random weights.")
    parser.add_argument("--variants", nargs="+", choices=list(PUBLISHED), default=["2B", "5B", "1.5-5B"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDER_NAMES, default=list(CONTENDER_NAMES))
    parser.add_argument("--compile", action="store_true", help="add diffusers with torch.compile")
    parser.add_argument("--measures", nargs="+", choices=[*TIMED, *ACCOUNTED], default=None,
                        help="all with CUDA; overhead and live memory without")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default=None, help="bf16 with CUDA, else fp32")
    parser.add_argument("--tiny", action="store_true", help="tiny networks for what is timed; always so on a CPU "
                        "unless --full is given")
    parser.add_argument("--full", action="store_true", help="published sizes on a CPU too")
    parser.add_argument("--cpu", action="store_true", help="the CPU, even where there is CUDA")
    parser.add_argument("--steps", type=int, default=4, help="of a timed sampling run")
    parser.add_argument("--repeat", type=int, default=3, help="timed calls in one process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender, in alternating order")
    parser.add_argument("--sampler", default="cogvideox_ddim", help="of this pack and diffusers")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--output", type=Path, help="Markdown file; else the table goes to stdout")
    parser.add_argument("--child", nargs=2, metavar=("JOB", "RESULTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.repeat < 1 or options.rounds < 1:
        parser.error("--steps must be at least 2 (a step is timed from the end of the one before), "
                     "--repeat and --rounds at least 1")
    return options


# ---- the child: everything that touches a device


def start_comfy(cpu: bool) -> None:
    """Before anything else of ComfyUI is imported: it must not read our command line, and may lack a GPU."""
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu
    logging.getLogger().setLevel(logging.ERROR)


def child(job_file: Path, results: Path) -> None:
    """Run a Job, or describe the machine for an empty one; a line of JSON for each measure as it is done."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    with results.open("a", encoding="utf-8") as file:
        for found in run_job(Job(**job)) if job else [describe()]:
            file.write(json.dumps(found) + "\n")
            file.flush()


def describe() -> dict[str, Any]:
    return {"cuda": torch.cuda.is_available(), "gpu": gpu_words(), "versions": versions()}


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu" if job.cpu else "cuda")
    if job.contender in NEEDS_COMFYUI:
        start_comfy(job.cpu)
    plan = Plan(job.repeat, job.steps, job.sampler)
    for name in job.measures:
        setting = (make_setting(job.variant, False, torch.device("meta"), torch.bfloat16) if name in ACCOUNTED
                   else make_setting(job.variant, job.tiny, device, DTYPES[job.dtype]))
        try:
            found = asdict(run_measure(name, job.contender, setting, plan))
        except NotMeasured as reason:
            found = {"problem": f"not measured: {reason}"}
        yield {"measure": name, **found}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# ---- the parent: no device


def run_child(job: dict[str, Any], timeout: float) -> tuple[list[dict[str, Any]], str]:
    """The lines that a child wrote, and why it stopped early; '' if it did not. It stays in this process group."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, results = Path(folder, "job.json"), Path(folder, "results.jsonl")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        results.touch()
        command = [sys.executable, str(RUN), "--child", str(job_file), str(results)]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            problem = f"timed out after {timeout:.0f} s"
        else:
            problem = last_line(done.stderr) or f"exit code {done.returncode}" if done.returncode else ""
        return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()], problem


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def run_to_the_end(job: Job, timeout: float, cells: Cells) -> None:
    """All measures of a job. One that kills its process is noted, and the rest go on in a new one."""
    left = list(job.measures)
    while left:
        found, problem = run_child({**asdict(job), "measures": left}, timeout)
        for line in found:
            cells[job.variant, line.pop("measure"), job.contender].add(line)
        left = left[len(found):]
        if left and problem:
            cells[job.variant, left.pop(0), job.contender].problem = f"failed: {problem}"
        elif left:
            raise RuntimeError(f"{job.contender}: the process ended well but did not measure {left}")


def rounds(options: argparse.Namespace, contenders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(variant, contender) in the order in which they run: back and forth, so that no one is always first."""
    for variant in options.variants:
        for turn in range(options.rounds):
            for contender in contenders if turn % 2 == 0 else reversed(contenders):
                yield variant, contender


def measure_all(options: argparse.Namespace, measures: Sequence[str], common: dict[str, Any]) -> Cells:
    contenders = [*options.contenders, *([COMPILED] if options.compile else [])]
    cells: Cells = {(variant, measure, contender): Cell() for variant in options.variants for measure in measures
                    for contender in contenders if contender != COMPILED or measure in COMPILED_MEASURES}
    for variant, contender in rounds(options, contenders):
        print(f"{variant} {contender} ...", file=sys.stderr, flush=True)
        # Accounting gives the same figure every time.
        mine = tuple(m for m in measures if (variant, m, contender) in cells
                     and not (m in ACCOUNTED and cells[variant, m, contender].peak is not None))
        run_to_the_end(Job(contender=contender, variant=variant, measures=mine, **common), options.timeout, cells)
    return cells


def size_words(variant: str, tiny: bool) -> str:
    setting = make_setting(variant, tiny, torch.device("cpu"), torch.float32)
    g, network = setting.geometry, setting.spec.transformer
    return (f"CogVideoX {variant}{', tiny network of this kind' if tiny else ''}: {g.width}x{g.height}, {g.frames} "
            f"frames, {network.num_layers} layers, {network.num_attention_heads} heads of {network.attention_head_dim}")


def sections(variants: Sequence[str], cells: Cells, tiny: bool) -> list[report.Section]:
    def section(title: str, explanation: str, head: Sequence[str], names: Sequence[str], row: Any,
                tiny: bool) -> report.Section:
        return report.Section(title, explanation, head, [
            (size_words(variant, tiny), [row(MEASURES[measure].title, contender, cell)
                                         for (v, measure, contender), cell in cells.items()
                                         if v == variant and measure in names])
            for variant in variants])

    both = [section("Times", report.EXPLANATION, report.TIME_HEAD, TIMED, report.time_row, tiny),
            section("Live memory in bf16", report.LIVE_EXPLANATION, report.LIVE_HEAD, ACCOUNTED, report.live_row,
                    tiny=False)]
    return [one for one in both if any(rows for _, rows in one.parts)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        child(Path(options.child[0]), Path(options.child[1]))
        return 0
    machine, problem = run_child({}, options.timeout)
    if problem:
        print(f"Cannot start: {problem}", file=sys.stderr)
        return 1
    facts = machine[0]
    if facts["versions"]["ComfyUI"] == "absent" and NEEDS_COMFYUI & set(options.contenders):
        print("ComfyUI is not importable: set COGX_COMFYUI to its folder, or choose --contenders diffusers.",
              file=sys.stderr)
        return 1
    cpu = options.cpu or not facts["cuda"]
    tiny = options.tiny or (cpu and not options.full)
    dtype = options.dtype or ("fp32" if cpu else "bf16")
    measures = options.measures or (ON_CPU if cpu else (*TIMED, *ACCOUNTED))
    common = {"dtype": dtype, "tiny": tiny, "cpu": cpu, "repeat": options.repeat, "steps": options.steps,
              "sampler": options.sampler}
    cells = measure_all(options, measures, common)
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    header = {"command": f"`{command}`", "GPU": "not used" if cpu else facts["gpu"], "driver": report.driver(),
              "host": report.host_words(), "dtype of what is timed": dtype, **facts["versions"]}
    text = report.document(header, sections(options.variants, cells, tiny))
    if options.output:
        options.output.write_text(text, encoding="utf-8")
        print(f"Wrote {options.output}", file=sys.stderr)
    else:
        print(text)
    return 0
