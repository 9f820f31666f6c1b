"""The benchmark runs, and prints and saves its rows. The tests do not judge the measured values."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm.common.errors import UserError
from scripts.benchmarks import device
from scripts.benchmarks.common import BenchmarkRow, Goal, median_row, ratio_row, time_alternating, until_error
from scripts.benchmarks.device import PeakMemory, matrix_rate, memory_of

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


@pytest.mark.slow
def test_scenes_are_printed_and_saved(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "scenes", "--quick", "--rounds", "1", "--device", "cpu",
                           "--outdir", str(tmp_path)], capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"].split(",")[0] for row in results["rows"]] == ["scenes"] * 3
    assert all(row["part"] == "scenes" and row["value"] > 1 for row in results["rows"])
    assert results["machine"]["kind"] == "cpu" and results["machine"]["torch"] == torch.__version__
    head, *lines = done.stdout.splitlines()
    assert results["machine"]["device"] in head
    assert [line.split("  ")[0] for line in lines] == [row["name"] for row in results["rows"]]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "complaint"), [
    (["speed"], "there is no part 'speed'"), (["scenes", "--compile", "--device", "cpu"], "--compile: is for CUDA")])
def test_impossible_options_are_refused(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments, "--outdir", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_functions_alternate_after_a_warm_up() -> None:
    order: list[str] = []
    times = time_alternating({name: lambda name=name: order.append(name) for name in "AB"}, 2)
    assert order == ["A", "B"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"A": 2, "B": 2}


def test_rows_tell_whether_they_meet_their_goal() -> None:
    ratio = ratio_row("one / other", [2.0, 3.0, 40.0], [1.0, 2.0, 10.0], Goal(2.0))  # 2, 1.5 and 4 times as long
    assert (ratio.value, ratio.minimum, ratio.maximum, ratio.met) == (2.0, 1.5, 4.0, True)
    assert "at most 2: yes" in str(ratio)
    share = median_row("share", [30.0, 44.0], "%", Goal(45, at_least=True))
    assert share.met is False and share.as_record()["goal"] == "at least 45"
    assert BenchmarkRow("missing", None, "s", goal=Goal(1), note="why").met is None
    assert str(BenchmarkRow("missing", None, "s", note="why")).endswith("why")


def test_a_part_that_fails_ends_with_the_reason() -> None:
    def measure() -> Iterator[BenchmarkRow]:
        yield BenchmarkRow("first", 1.0, "s")
        raise UserError("no such file")

    first, last = until_error("part", measure())
    assert first.value == 1 and last.value is None and last.note == "no such file"


def test_shared_memory_counts_once() -> None:
    weight = torch.zeros(100)
    assert memory_of([weight, weight.view(10, 10), torch.zeros(50)]) == 600
    layer = torch.nn.Linear(10, 10)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 10)).sum().backward()
    before = memory_of([layer, optimizer])
    optimizer.step()
    assert before == 440 and memory_of([layer, optimizer]) == 3 * 440 + 2 * 4  # two averages and a step count each


@pytest.mark.slow
def test_peak_memory_of_a_function() -> None:
    peak_memory = PeakMemory(torch.device("cpu"))
    peak = peak_memory.measure(lambda: torch.ones(20_000_000))
    assert peak is None if not peak_memory.is_supported else 70e6 < peak < 200e6


def test_matrix_rate_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.MATRIX_SIDE, "cpu", 256)
    assert 1e8 < matrix_rate(torch.device("cpu"), rounds=1) < 1e16
