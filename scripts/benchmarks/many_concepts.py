"""Several concepts trained in one run on one frozen base model, and prompts of different concepts in one batch.

Runs are `main.py` as a user starts it, with imports, loading and saving. The cost of a concept is the time of a run
divided by the number of its concepts.
"""
from __future__ import annotations

from collections.abc import Iterator

from evaluation.mini.parts import time_command
from scripts.benchmarks.common import (
    ROOT,
    BenchmarkRow,
    BenchmarkSettings,
    Goal,
    median_row,
    ratio_row,
    time_alternating,
)
from scripts.benchmarks.sampling import build_pipelines, generation_settings
from scripts.benchmarks.whole_concept import run_length, training_command, write_run_files

COUNTS, QUICK_COUNTS = (1, 4, 16, 64), (1, 4)
GOALS = {16: Goal(0.6)}  # on a GPU
BATCH_SIZE = 4  # prompts in one batch


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    yield from measure_one_batch(settings)
    yield from measure_one_run(settings)


def measure_one_run(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    """Measure the cost of a concept in runs with more and more concepts."""
    files = write_run_files(settings)
    steps, batch = run_length(settings)
    details = f"{steps} steps of batch {batch} each, {settings.side} px"
    costs: dict[int, float] = {}
    for count in QUICK_COUNTS if settings.quick else COUNTS:
        command = training_command(settings, files, f"run_{count}", count)
        costs[count] = time_command(command, None, ROOT) / count
        yield BenchmarkRow(f"cost of a concept, {count} in a run, {details}", costs[count], "s", note="once")
        if count > 1:
            has_goal = settings.shape.has_goals and settings.device.type == "cuda"
            yield BenchmarkRow(f"cost of a concept, {count} in a run / in {count} runs", costs[count] / costs[1], "x",
                               goal=GOALS.get(count) if has_goal else None, note="once")


def measure_one_batch(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    """Compare a batch of prompts that each name another concept with the same batch without concepts."""
    counts = {"each with a concept of its own": BATCH_SIZE, "without concepts": 0}
    pipelines = build_pipelines(settings, list(counts.values()))
    generation = generation_settings(settings)
    functions = {}
    for name, count in counts.items():
        pipeline = pipelines[count]
        prompts = [pipeline.prompt(index) for index in range(BATCH_SIZE)]
        functions[name] = lambda pipeline=pipeline, prompts=prompts: pipeline.generate_batch(prompts, generation)
    times = time_alternating(functions, settings.rounds)

    images = f"{BATCH_SIZE} images in one batch"
    for name in counts:
        yield median_row(f"{images}, {name}, {generation.num_inference_steps} steps, {settings.side} px", times[name],
                         "s")
    yield ratio_row(f"{images}, each with a concept / without", *(times[name] for name in counts))
