"""The README's two commands on the bundled model, on two cores at most."""
from __future__ import annotations

import sys
from collections.abc import Iterator

from evaluation.mini.parts import THREADS, seconds_of
from scripts.benchmarks.common import ROOT, Goal, Row, Settings

TRAINING = ("main.py", "--base", "configs/perfusion.yaml", "--accelerator", "cpu")
TRAINING_GOAL = Goal(120)


def measure(settings: Settings) -> Iterator[Row]:
    command = [sys.executable, *TRAINING, "-l", settings.folder / "mini"]
    yield Row(f"README's training on the bundled model, {THREADS} threads at most", seconds_of(command, cwd=ROOT), "s",
              goal=TRAINING_GOAL, note="once")
    if settings.with_tests:
        taken = seconds_of([sys.executable, "-m", "pytest"], cwd=ROOT)
        yield Row(f"README's tests, {THREADS} threads at most", taken, "s", note="once")
