"""A whole concept by `main.py` as a user runs it, the first picture after a start, and what start-up costs.

Every run is a process of its own, with imports, loading and saving. The covariance, which is computed once per text
encoder and kept, is there already; `parts` says what it takes.
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

from evaluation.mini.parts import seconds_of
from scripts.benchmarks.common import ROOT, Goal, Row, Settings, median_row, repeated
from scripts.benchmarks.parts import save_segmenter
from scripts.benchmarks.random_models import (
    checkpoint_file,
    covariance_file,
    random_model,
    random_photos,
    read_config,
)

ACCELERATORS = {"cuda": "gpu", "mps": "mps", "cpu": "cpu"}
STEPS, BATCH = 400, 16
QUICK_STEPS = {"sd": 4, "mini": 20}
QUICK_BATCH = {"sd": 1, "mini": 16}
GOAL = Goal(45)
IMPORTS = {"torch": "import torch", "everything that draws": "import ldm.inference.run"}


@dataclass(frozen=True)
class Files:
    """What a run of the shape loads: checkpoint, covariance and segmenter; None: what its config names."""

    checkpoint: Path | None = None
    covariance: Path | None = None
    segmenter: Path | None = None


def make_files(settings: Settings) -> Files:
    """Random ones of the real shapes, or none where a model of this shape ships with the project."""
    if settings.shape.checkpoint is not None:
        return Files()
    model = random_model(read_config(settings.shape.draw).model, use_ema=False)
    width = read_config(settings.shape.teach).model.params.unet_config.params.context_dim
    return Files(checkpoint_file(model, settings.folder),
                 covariance_file(model.cond_stage_model, width, settings.folder),
                 save_segmenter(settings, settings.folder / "segmenter"))


def length_of_run(settings: Settings) -> tuple[int, int]:
    """Steps, and pictures in each."""
    name = settings.shape.name
    return (QUICK_STEPS[name], QUICK_BATCH[name]) if settings.quick else (STEPS, BATCH)


def training_command(settings: Settings, files: Files, name: str, concepts: int = 1) -> list[str | Path]:
    """`main.py` on random photos of so many things, its log folder `name`, with a clock that leaves `name`.json."""
    photos = [random_photos(settings.folder / f"photos_{settings.side}" / f"thing-{number}", settings.side, seed=number)
              for number in range(concepts)]
    steps, batch = length_of_run(settings)
    keys: dict[str, object] = {
        "model.params.covariance": files.covariance, "model.params.segmenter": files.segmenter,
        "model.params.unet_config.params.use_checkpoint": "false", "data.params.batch_size": batch,
        "data.params.train.params.size": settings.side, "lightning.trainer.accumulate_grad_batches": 1,
        "lightning.callbacks.clock.target": "scripts.benchmarks.clock.Clock",
        "lightning.callbacks.clock.params.path": settings.folder / f"{name}.json"}
    if settings.quick:
        keys |= {"lightning.callbacks.previews.params.prompts": '["a photo of a {}"]',
                 "lightning.callbacks.previews.params.num_inference_steps": 2,
                 "model.params.image_size": _latent_side(settings)}
    if concepts > 1:
        keys["data.params.concepts_per_batch"] = max(1, settings.shape.most_pictures // batch)
    if settings.device.type != "cuda":
        keys["lightning.trainer.precision"] = "32-true"
    base = [] if files.checkpoint is None else ["--actual_resume", files.checkpoint]
    return [sys.executable, "main.py", "--base", settings.shape.teach, *base, "--data_root", *photos, "--init_word",
            "teddy bear", "-l", settings.folder / name, "--max_steps", str(steps), "--accelerator",
            ACCELERATORS[settings.device.type], *(f"{key}={value}" for key, value in keys.items() if value is not None)]


def _latent_side(settings: Settings) -> int:
    usual = read_config(settings.shape.teach).model.params.image_size
    return usual * settings.side // settings.shape.side


def read_clock(settings: Settings, name: str) -> Mapping[str, object]:
    """What the clock of the run of this name left."""
    return json.loads((settings.folder / f"{name}.json").read_text())


def measure(settings: Settings) -> Iterator[Row]:
    for what, code in IMPORTS.items():
        command = [sys.executable, "-c", code]
        yield median_row(f"start-up: importing {what}",
                         repeated(lambda command=command: seconds_of(command, None, ROOT), settings.rounds), "s")
    files = make_files(settings)
    yield from start_up(settings, files)
    yield from teaching(settings, files)


def start_up(settings: Settings, files: Files) -> Iterator[Row]:
    """Until a model is loaded, and until a first picture is there."""
    checkpoint = files.checkpoint or ROOT / str(settings.shape.checkpoint)
    load = ("import sys; from ldm import inference; config = inference.read_model_config(sys.argv[1]); "
            "inference.load_base(config, sys.argv[2], sys.argv[3])")
    loading = [sys.executable, "-c", load, settings.shape.draw, checkpoint, settings.device]
    draw = [sys.executable, "scripts/txt2img.py", "--config", settings.shape.draw, "--ckpt", checkpoint, "--prompt",
            "a photo of a teddy bear", "--n_samples", "1", "--ddim_steps", settings.sampling_steps,
            "--device", settings.device, "--H", settings.side, "--W", settings.side, "--outdir",
            settings.folder / "first"]
    first = f"first picture after a start, {settings.sampling_steps} steps, {settings.side} px"
    for what, command in (("start-up: imports and loading the model", loading), (first, draw)):
        taken = repeated(lambda command=command: seconds_of(command, None, ROOT), settings.rounds)
        yield median_row(what, taken, "s")


def teaching(settings: Settings, files: Files) -> Iterator[Row]:
    """One whole run; how its time divides."""
    steps, batch = length_of_run(settings)
    command = training_command(settings, files, "run")
    began = time.time()
    whole = seconds_of(command, None, ROOT)
    clock = read_clock(settings, "run")
    what = f"{steps} steps of batch {batch}, {settings.side} px"
    asked = settings.shape.has_goals and settings.on_hopper and (steps, batch) == (STEPS, BATCH)
    yield Row(f"a whole concept, {what}", whole, "s", goal=GOAL if asked else None, note="once; pictures included")
    yield Row("of that, until training is ready", clock["ready"] - began, "s", note="once")
    between = [later - earlier for earlier, later in pairwise(clock["starts"])]
    yield Row(f"a step in that run, {what}", statistics.median(between), "s", min(between), max(between), len(between))
