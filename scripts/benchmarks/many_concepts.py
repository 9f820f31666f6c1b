"""Several concepts learned in one run on one frozen base model, and prompts of different concepts in one batch.

Runs are `main.py` as a user starts it, with imports, loading and saving; the cost of a concept is a run's time over how
many it learns.
"""
from __future__ import annotations

from collections.abc import Iterator

from evaluation.mini.parts import seconds_of
from scripts.benchmarks.common import ROOT, Goal, Race, Row, Settings, median_row, ratio_row
from scripts.benchmarks.sampling import Drawer
from scripts.benchmarks.whole_concept import length_of_run, make_files, training_command

COUNTS, QUICK_COUNTS = (1, 4, 16, 64), (1, 4)
GOALS = {16: Goal(0.6)}  # on a GPU
TOGETHER = 4  # prompts in one batch


def measure(settings: Settings) -> Iterator[Row]:
    yield from one_batch(settings)
    yield from one_run(settings)


def one_run(settings: Settings) -> Iterator[Row]:
    """The cost of a concept in runs that learn more and more of them."""
    files = make_files(settings)
    steps, batch = length_of_run(settings)
    what = f"{steps} steps of batch {batch} each, {settings.side} px"
    costs: dict[int, float] = {}
    for count in QUICK_COUNTS if settings.quick else COUNTS:
        command = training_command(settings, files, f"learn_{count}", count)
        costs[count] = seconds_of(command, None, ROOT) / count
        yield Row(f"cost of a concept, {count} in a run, {what}", costs[count], "s", note="once")
        if count > 1:
            asked = settings.shape.has_goals and settings.device.type == "cuda"
            yield Row(f"cost of a concept, {count} in a run / in {count} runs", costs[count] / costs[1], "x",
                      goal=GOALS.get(count) if asked else None, note="once")


def one_batch(settings: Settings) -> Iterator[Row]:
    """A batch of prompts of which each uses another concept, against the same batch without concepts."""
    drawer = Drawer(settings, TOGETHER)
    names = {"each with a concept of its own": TOGETHER, "without concepts": 0}
    encoders = {name: drawer.encoder(loaded) for name, loaded in names.items()}
    prompts = {name: [drawer.prompt(number, loaded) for number in range(TOGETHER)] for name, loaded in names.items()}
    times = Race({name: lambda name=name: drawer.draw(encoders[name], prompts[name]) for name in names}
                 ).run(settings.rounds)
    what = f"{TOGETHER} pictures in one batch"
    for name in names:
        yield median_row(f"{what}, {name}, {drawer.sampling.steps} steps, {settings.side} px", times[name], "s")
    yield ratio_row(f"{what}, each with a concept / without", *(times[name] for name in names))
