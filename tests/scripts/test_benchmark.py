"""The benchmark runs, prints a row per measurement and keeps them; what it prints is not judged."""
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
from scripts.benchmarks.common import Goal, Race, Row, median_row, ratio_row, rows_of
from scripts.benchmarks.device import MemoryWatch, bytes_of, matrix_rate

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


def test_scenes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "scenes", "--quick", "--rounds", "1", "--device", "cpu",
                           "--outdir", str(tmp_path)], capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"].split(",")[0] for row in results["rows"]] == ["scenes"] * 3
    assert all(row["part"] == "scenes" and row["value"] > 1 for row in results["rows"])
    assert results["machine"]["kind"] == "cpu" and results["machine"]["torch"] == torch.__version__
    head, *lines = done.stdout.splitlines()
    assert results["machine"]["device"] in head
    assert [line.split("  ")[0] for line in lines] == [row["what"] for row in results["rows"]]


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["speed"], "there is no part 'speed'"), (["scenes", "--compile", "--device", "cpu"], "--compile: is for CUDA")])
def test_what_cannot_be_measured(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments, "--outdir", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_contestants_take_turns_after_a_warm_up() -> None:
    order: list[str] = []
    times = Race({name: lambda name=name: order.append(name) for name in "AB"}).run(2)
    assert order == ["A", "B"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"A": 2, "B": 2}


def test_rows_say_whether_their_goal_is_reached() -> None:
    ratio = ratio_row("one / other", [2.0, 3.0, 40.0], [1.0, 2.0, 10.0], Goal(2.0))  # 2, 1.5 and 4 times as long
    assert (ratio.value, ratio.lowest, ratio.highest, ratio.met) == (2.0, 1.5, 4.0, True)
    assert "at most 2: yes" in str(ratio)
    share = median_row("share", [30.0, 44.0], "%", Goal(45, at_least=True))
    assert share.met is False and share.as_record()["goal"] == "at least 45"
    assert Row("missing", None, "s", goal=Goal(1), note="why").met is None
    assert str(Row("missing", None, "s", note="why")).endswith("why")


def test_a_part_that_cannot_go_on_says_why() -> None:
    def measure() -> Iterator[Row]:
        yield Row("first", 1.0, "s")
        raise UserError("no such file")

    first, last = rows_of("part", measure())
    assert first.value == 1 and last.value is None and last.note == "no such file"


def test_shared_memory_counts_once() -> None:
    weight = torch.zeros(100)
    assert bytes_of([weight, weight.view(10, 10), torch.zeros(50)]) == 600
    layer = torch.nn.Linear(10, 10)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 10)).sum().backward()
    before = bytes_of([layer, optimizer])
    optimizer.step()
    assert before == 440 and bytes_of([layer, optimizer]) == 3 * 440 + 2 * 4  # two averages and a count of steps each


def test_memory_of_a_piece_of_work() -> None:
    watch = MemoryWatch(torch.device("cpu"))
    most = watch.during(lambda: torch.ones(20_000_000))
    assert most is None if not watch.works else 70e6 < most < 200e6


def test_a_matrix_rate_is_no_more_than_a_device_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.MATRIX_SIDE, "cpu", 256)
    assert 1e8 < matrix_rate(torch.device("cpu"), rounds=1) < 1e16
