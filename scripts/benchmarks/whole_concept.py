"""A whole concept by `main.py` as a user runs it, the first image after a start, and the time of start-up.

Every run is a process of its own, with imports, loading and saving. The covariance, which is computed once per text
encoder and cached, exists already; the part `parts` measures it.
"""
from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from evaluation.mini.parts import time_command
from scripts.benchmarks.common import ROOT, BenchmarkRow, BenchmarkSettings, Goal, median_row, time_calls
from scripts.benchmarks.parts import write_segmenter
from scripts.benchmarks.random_models import (
    random_model,
    random_photos,
    read_config,
    write_checkpoint,
    write_covariance,
)

ACCELERATORS = {"cuda": "gpu", "mps": "mps", "cpu": "cpu"}
STEPS, BATCH = 400, 16
QUICK_STEPS = {"sd": 4, "mini": 20}
QUICK_BATCH = {"sd": 1, "mini": 16}
GOAL = Goal(45)
IMPORTS = {"torch": "import torch", "the pipeline": "from ldm.inference import PerfusionPipeline"}
LOAD_PIPELINE = ("import sys; from ldm.inference import PerfusionPipeline; "
                 "PerfusionPipeline.from_config(*sys.argv[1:])")  # config, checkpoint, device


@dataclass(frozen=True)
class RunFiles:
    """The files that a run loads; None: what the config names."""

    checkpoint: Path | None = None
    covariance: Path | None = None
    segmenter: Path | None = None


def write_run_files(settings: BenchmarkSettings) -> RunFiles:
    """Write random files of the real shapes, unless the model's files are in this project."""
    if settings.shape.checkpoint is not None:
        return RunFiles()
    model = random_model(read_config(settings.shape.inference_config).model, use_ema=False)
    width = read_config(settings.shape.train_config).model.params.unet_config.params.context_dim
    return RunFiles(write_checkpoint(model, settings.folder),
                    write_covariance(model.cond_stage_model, width, settings.folder),
                    write_segmenter(settings, settings.folder / "segmenter"))


def run_length(settings: BenchmarkSettings) -> tuple[int, int]:
    """Return the number of steps of a run, and its batch size."""
    name = settings.shape.name
    return (QUICK_STEPS[name], QUICK_BATCH[name]) if settings.quick else (STEPS, BATCH)


def training_command(settings: BenchmarkSettings, files: RunFiles, name: str, concepts: int = 1) -> list[str | Path]:
    """Return the command that trains concepts on random photos, with a clock.

    Args:
        settings: shape, device and size.
        files: what the run loads.
        name: name of the log folder; the clock writes `<name>.json` beside it.
        concepts: number of concepts.
    """
    photos = [random_photos(settings.folder / f"photos_{settings.side}" / f"subject-{index}", settings.side, seed=index)
              for index in range(concepts)]
    steps, batch = run_length(settings)
    overrides: dict[str, object] = {
        "model.params.covariance": files.covariance,
        "model.params.segmenter": files.segmenter,
        "model.params.unet_config.params.use_checkpoint": "false",
        "data.params.batch_size": batch,
        "data.params.train.params.size": settings.side,
        "lightning.trainer.accumulate_grad_batches": 1,
        "lightning.callbacks.clock.target": "scripts.benchmarks.clock.StepClock",
        "lightning.callbacks.clock.params.path": settings.folder / f"{name}.json",
    }
    if settings.quick:
        overrides |= {"lightning.callbacks.previews.params.prompts": '["a photo of a {}"]',
                      "lightning.callbacks.previews.params.num_inference_steps": 2,
                      "model.params.image_size": _latent_side(settings)}
    if concepts > 1:
        overrides["data.params.concepts_per_batch"] = max(1, settings.shape.max_images_per_pass // batch)
    if settings.device.type != "cuda":
        overrides["lightning.trainer.precision"] = "32-true"
    base_model = [] if files.checkpoint is None else ["--actual_resume", files.checkpoint]
    return [sys.executable, "main.py", "--base", settings.shape.train_config, *base_model, "--data_root", *photos,
            "--init_word", "teddy bear", "-l", settings.folder / name, "--max_steps", str(steps), "--accelerator",
            ACCELERATORS[settings.device.type],
            *(f"{key}={value}" for key, value in overrides.items() if value is not None)]


def _latent_side(settings: BenchmarkSettings) -> int:
    latent_side = read_config(settings.shape.train_config).model.params.image_size
    return latent_side * settings.side // settings.shape.side


def read_clock(settings: BenchmarkSettings, name: str) -> Mapping[str, object]:
    """Return what the clock of a run wrote."""
    return json.loads((settings.folder / f"{name}.json").read_text())


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    for name, code in IMPORTS.items():
        yield _command_row(f"start-up: importing {name}", [sys.executable, "-c", code], settings)
    files = write_run_files(settings)
    yield from measure_start_up(settings, files)
    yield from measure_training(settings, files)


def measure_start_up(settings: BenchmarkSettings, files: RunFiles) -> Iterator[BenchmarkRow]:
    """Measure the time until a model is loaded, and until the first image is generated."""
    config = settings.shape.inference_config
    checkpoint = files.checkpoint or ROOT / str(settings.shape.checkpoint)
    load = [sys.executable, "-c", LOAD_PIPELINE, config, checkpoint, settings.device]
    generate = [sys.executable, "scripts/txt2img.py", "--config", config, "--ckpt", checkpoint, "--prompt",
                "a photo of a teddy bear", "--n_samples", "1", "--ddim_steps", settings.sampling_steps,
                "--device", settings.device, "--H", settings.side, "--W", settings.side, "--outdir",
                settings.folder / "first"]
    yield _command_row("start-up: imports and loading the model", load, settings)
    yield _command_row(f"first image after a start, {settings.sampling_steps} steps, {settings.side} px", generate,
                       settings)


def _command_row(name: str, command: list[object], settings: BenchmarkSettings) -> BenchmarkRow:
    return median_row(name, time_calls(lambda: time_command(command, None, ROOT), settings.rounds), "s")


def measure_training(settings: BenchmarkSettings, files: RunFiles) -> Iterator[BenchmarkRow]:
    """Measure one whole run, and how its time divides."""
    steps, batch = run_length(settings)
    command = training_command(settings, files, "run")
    start = time.time()
    seconds = time_command(command, None, ROOT)
    clock = read_clock(settings, "run")
    details = f"{steps} steps of batch {batch}, {settings.side} px"
    has_goal = settings.shape.has_goals and settings.on_hopper and (steps, batch) == (STEPS, BATCH)
    yield BenchmarkRow(f"a whole concept, {details}", seconds, "s", goal=GOAL if has_goal else None,
                       note="once; previews included")
    yield BenchmarkRow("of that, until training is ready", clock["ready"] - start, "s", note="once")
    step_times = [later - earlier for earlier, later in pairwise(clock["starts"])]
    yield BenchmarkRow(f"a step in that run, {details}", statistics.median(step_times), "s", min(step_times),
                       max(step_times), len(step_times))
