"""Training runs of main.py on the bundled model, in this process or in another."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.cli.training import parse_training_options
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.templates import fill_template
from ldm.models.diffusion.objectives import resize_mask_to_latents
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.personalization.perfusion import Perfusion
from ldm.training.run import train

ROOT = Path(__file__).resolve().parents[2]
BASE = ("--base", "configs/perfusion.yaml")
FEW_IMAGES = ('lightning.callbacks.previews.params.prompts=["a photo of a {}"]',
              "lightning.callbacks.previews.params.num_inference_steps=2")
QUICK = ("--max_steps", "2", *FEW_IMAGES, "data.params.batch_size=2")


def run_main(arguments: Sequence[str]) -> None:
    """Do what `main.py` does with these arguments, in this process."""
    train(parse_training_options(arguments))


@contextlib.contextmanager
def in_project_root(threads: int = 1) -> Any:
    """Work in the project's folder with one thread, so that sums are rounded as in other processes of the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with contextlib.chdir(ROOT):
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)  # a run's config sets it for the whole process


def train_main(folder: Path, *arguments: object, threads: int = 1) -> Path:
    """Train on the bundled example, unless arguments say otherwise; return the log folder."""
    with in_project_root(threads):
        run_main([*BASE, "-l", str(folder), *map(str, arguments)])
    (logdir,) = folder.iterdir()
    return logdir


def resume_run(logdir: Path, *arguments: object) -> Path:
    with in_project_root():
        run_main(["--resume", str(logdir), *map(str, arguments)])
    return logdir


def start_process(*command: object) -> subprocess.Popen[str]:
    """Start a process in the project's folder, stderr merged into stdout, buffered as in a user's pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment)


def process_output(*command: object) -> str:
    """Run a process and return what it printed; fail if it fails."""
    process = start_process(*command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def load_state(logdir: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    return torch.load(logdir / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


class LossRecorder(pl.Callback):
    """Writes `losses.json`: the loss before and after training, on the same latents, noise and timesteps."""

    TIMESTEPS = 8

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, model: Perfusion) -> None:
        self.losses.append(fixed_loss(model, trainer.datamodule.datasets["train"], self.TIMESTEPS))
        (Path(trainer.default_root_dir) / "losses.json").write_text(json.dumps(self.losses))

    on_train_end = on_train_start


class PhotoRecorder(pl.Callback):
    """Remembers the photos of the last run in this process."""

    photos: ConceptPhotos

    def on_train_start(self, trainer: pl.Trainer, model: Perfusion) -> None:
        PhotoRecorder.photos = trainer.datamodule.datasets["train"]


class InterruptAt(pl.Callback):
    """Sends Ctrl-C while a batch is trained.

    Args:
        batch: its number, from 0; -1: never.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            signal.raise_signal(signal.SIGINT)


class WaitForInterrupt(pl.Callback):
    """Prints a line while a batch is trained, and then waits for Ctrl-C, however fast the machine is.

    Args:
        batch: its number, from 0; -1: never.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx != self.batch:
            return
        handler, patience = signal.getsignal(signal.SIGINT), time.monotonic() + 120
        print("waiting for a signal", flush=True)
        while signal.getsignal(signal.SIGINT) is handler:  # StopAfterStep puts back the one before it
            assert time.monotonic() < patience, "nobody sent a signal"
            time.sleep(0.01)


@torch.no_grad()
def fixed_loss(model: Perfusion, data: ConceptPhotos, timesteps: int) -> float:
    """Return the mean loss of every photo at `timesteps` noise levels, with alternating prompts."""
    generator = torch.Generator().manual_seed(99)
    photos = torch.arange(len(data.images)).repeat_interleave(timesteps)
    posterior = DiagonalGaussianDistribution(model.cached_latents.moments[photos, 0])
    latents = model.scale_factor * posterior.sample(generator)
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.linspace(0.05, 0.95, timesteps).mul(model.num_timesteps).long().repeat(len(data.images))
    templates = [data.templates[index % len(data.templates)] for index in range(len(latents))]
    prompts = [fill_template(template, model.placeholders[0]) for template in templates]
    weight = resize_mask_to_latents(torch.stack([data.mask(int(photo)) for photo in photos]), latents.shape[-2:])
    return float(model.p_losses(latents, model.prompt_context(prompts), t, noise, weight)[0])
