"""The README's two commands on the bundled model, on two cores at most."""
from __future__ import annotations

import sys
from collections.abc import Iterator

from evaluation.mini.parts import THREADS, time_command
from scripts.benchmarks.common import ROOT, BenchmarkRow, BenchmarkSettings, Goal

TRAINING = ("main.py", "--base", "configs/perfusion.yaml", "--accelerator", "cpu")
TRAINING_GOAL = Goal(120)


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    command = [sys.executable, *TRAINING, "-l", settings.folder / "mini"]
    seconds = time_command(command, cwd=ROOT)
    yield BenchmarkRow(f"README's training on the bundled model, {THREADS} threads at most", seconds, "s",
                       goal=TRAINING_GOAL, note="once")
    if settings.with_tests:
        seconds = time_command([sys.executable, "-m", "pytest"], cwd=ROOT)
        yield BenchmarkRow(f"README's tests, {THREADS} threads at most", seconds, "s", note="once")
