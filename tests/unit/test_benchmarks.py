"""The accounting of live memory, and how benchmarks/run.py survives what its processes do. No ComfyUI, no GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cogx.benchmarks import command, report
from cogx.benchmarks.live_memory import LiveMemory, accounting, peak_of
from cogx.benchmarks.measure import MEASURES, forward_operations
from cogx.benchmarks.report import Cell
from cogx.benchmarks.setting import make_setting

KIB = 1024


def ones(count: int, device: str = "cpu") -> torch.Tensor:
    """``count`` KiB of fp32."""
    return torch.ones(count * KIB // 4, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_is_what_is_alive_at_once(device: str) -> None:
    with accounting() as memory:
        a = ones(8, device)
        b = a + 1  # 16 alive
        del a
        c = b.view(2, -1)  # a view is no memory
        b = c * 2  # 16: the old b lives on in its view
        del b
        d = torch.cat([c.flatten(), c.flatten()])  # 8 + 16
        assert memory.live == 24 * KIB
        del c, d
    assert memory.live == 0
    assert memory.peak == 24 * KIB


def test_in_place_and_what_existed_before_count_nothing() -> None:
    weight = ones(64, "meta")
    memory = peak_of(lambda: weight.add_(1).mul_(2).view(4, -1).relu_())
    assert memory.peak == 0


def test_composite_operations_count_their_parts() -> None:
    """A linear layer with bias on 3-D input arrives whole in inference mode; its output must not be missed."""
    x, weight, bias = (torch.empty(shape, device="meta") for shape in ((2, 3, 16), (8, 16), (8,)))
    with accounting() as memory:
        out = F.linear(x, weight, bias)
    assert memory.peak == out.numel() * 4


def test_nearest_upsampling_counts_its_output_only() -> None:
    x = torch.empty(1, 4, 2, 8, 8, device="meta", dtype=torch.bfloat16)
    with accounting() as memory:
        out = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0))
    assert memory.peak == out.numel() * 2


def test_attention_on_meta_has_no_matrix_of_scores() -> None:
    q, k, v = (torch.empty(1, 512, 4, 16, device="meta").transpose(1, 2) for _ in range(3))
    with accounting() as memory:
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert memory.peak == out.numel() * 4
    assert out.is_contiguous()


def test_parts_and_copies_to_the_host() -> None:
    """Parts of a tensor are views of it, whichever of them is left; a copy to the CPU takes no memory of the device."""
    x = ones(12, "meta")
    with accounting() as memory:
        first, *rest = (x + 1).chunk(3)
        host = first.cpu()
        assert memory.live == 12 * KIB + host.untyped_storage().nbytes() <= 12 * KIB + 4
        del first, host, rest[0]
        assert memory.live == 12 * KIB
        rest.clear()
        assert memory.live == 0


def test_what_stands_for_host_memory_is_counted_apart() -> None:
    """What is read from it to the device is counted, what is written to it, and its views, are not."""
    with accounting() as memory:
        host = memory.host((3, 1024), torch.float32)
        host[1:].flatten().view(2, -1)[0].copy_(ones(4, "meta"))
        assert (memory.live, memory.peak, memory.hosted) == (0, 4 * KIB, 12 * KIB)
        copy = torch.empty(3, 1024, device="meta").copy_(host)
        assert memory.live == 12 * KIB
        del copy, host
        kept = ones(8, "meta")
        assert memory.live == 8 * KIB and kept is not None
    assert (memory.peak, memory.hosted) == (12 * KIB, 12 * KIB)


def test_what_an_error_holds_is_counted_until_it_is_gone() -> None:
    def fail() -> None:
        kept = ones(8) + 1
        raise ValueError(kept.shape)

    with accounting() as memory:
        try:
            fail()
        except ValueError as error:
            assert memory.live == 8 * KIB and error is not None
        assert memory.live == 0
    with accounting() as again:
        ones(4)
    assert again.peak == 4 * KIB


def test_the_peak_says_where() -> None:
    with LiveMemory() as memory:
        kept = torch.zeros(KIB) + torch.zeros(KIB)
    assert kept is not None
    assert "aten.add.Tensor at test_benchmarks.py:" in memory.describe_peak()


@pytest.mark.parametrize("variant, batch, teraflops",
                         [("2B", 1, 120), ("5B", 1, 332), ("1.5-5B", 1, 1479), ("5B", 2, 664)])
def test_operations_of_a_forward(variant: str, batch: int, teraflops: float) -> None:
    setting = make_setting(variant, False, torch.device("meta"), torch.bfloat16)
    assert forward_operations(setting, batch) / 1e12 == pytest.approx(teraflops, rel=0.01)


# ---- the command


def job(*measures: str) -> command.Job:
    return command.Job("cogx", "5B", measures, "fp32", True, True, 1, 2, "cogvideox_ddim")


def cells_of(*measures: str) -> command.Cells:
    return {("5B", measure, "cogx"): Cell() for measure in measures}


def test_a_measure_that_kills_its_process_is_noted_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(asked_for: dict[str, Any], timeout: float) -> tuple[list[dict[str, Any]], str]:
        names = list(asked_for["measures"])
        asked.append(names)
        good = names[:names.index("decode")] if "decode" in names else names
        return [{"measure": name, "seconds": [1.0]} for name in good], "out of memory" if "decode" in names else ""

    monkeypatch.setattr(command, "run_child", run)
    cells = cells_of("forward", "decode", "encode")
    command.run_to_the_end(job("forward", "decode", "encode"), 1, cells)
    assert asked == [["forward", "decode", "encode"], ["encode"]]
    assert cells["5B", "decode", "cogx"].problem == "failed: out of memory"
    assert cells["5B", "encode", "cogx"].seconds == [1.0]


def test_the_last_words_of_a_process_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("import sys\nopen(sys.argv[3], 'a').write('{\"measure\": \"step\"}\\n')\nsys.exit('no luck')\n")
    monkeypatch.setattr(command, "RUN", script)
    assert command.run_child({}, 60) == ([{"measure": "step"}], "no luck")


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(command, "RUN", script)
    assert command.run_child({}, 0.5) == ([], "timed out after 0 s")


def test_contenders_take_turns_at_being_first() -> None:
    options = argparse.Namespace(variants=["2B"], rounds=3)
    order = [contender for _, contender in command.rounds(options, ["a", "b", "c"])]
    assert order == [*"abc", *"cba", *"abc"]


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--repeat", "0"], ["--variants", "7B"]])
def test_senseless_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(arguments)


def test_rounds_add_up() -> None:
    cell = Cell()
    cell.add({"seconds": [2.0, 4.0], "peak": 5, "weights": 3, "note": "eager"})
    cell.add({"seconds": [9.0], "peak": 4, "weights": 3})
    assert (cell.seconds, cell.peak, cell.note) == ([2.0, 4.0, 9.0], 5, "eager")
    row = report.time_row("step", "cogx", cell)
    assert row[2:5] == ["4 s", "2 s to 9 s", "3"]


def test_every_cell_has_a_row_and_every_table_its_columns() -> None:
    cells = {("2B", measure, contender): Cell([0.5], peak=2**30, work=1e12)
             for measure in MEASURES for contender in ("cogx", "core")}
    cells["2B", "step", "core"] = Cell(problem="not measured: a | b")
    text = report.document({"command": "x"}, command.sections(["2B"], cells, tiny=True))
    lines = text.splitlines()
    assert sum("| cogx |" in line for line in lines) == len(MEASURES)
    assert "tiny network of this kind: 96x64, 17 frames" in text and "720x480, 49 frames, 30 layers" in text
    for title, head in (("## Times", report.TIME_HEAD), ("## Live memory", report.LIVE_HEAD)):
        part = text[text.index(title):].split("\n## ")[0].splitlines()
        rows = [line for line in part if line.startswith("|")]
        assert {line.count("|") for line in rows} == {len(head) + 1}


def test_without_comfyui_it_says_what_to_set(capfd: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"cuda": False, "gpu": "", "versions": {"ComfyUI": "absent"}}
    monkeypatch.setattr(command, "run_child", lambda *_: ([json.loads(json.dumps(facts))], ""))
    assert command.main([]) == 1
    assert "set COGX_COMFYUI" in capfd.readouterr().err


def test_help_needs_nothing() -> None:
    done = subprocess.run([sys.executable, str(command.RUN), "--help"], capture_output=True, text=True, timeout=120,
                          check=False, env={})
    assert done.returncode == 0 and "--contenders" in done.stdout
