"""Names of Lightning 1 that training scripts of 2022 use, for the child process alone; the same for both packages.

| stand-in | because Lightning 2 |
|---|---|
| `DDPPlugin`, `TestTubeLogger` | has moved or dropped these names |
| `WandbLogger` | needs the package wandb |
| `Trainer.add_argparse_args`, `from_argparse_args`, `Trainer(gpus=...)`, `root_gpu` | leaves command lines to scripts |
| `accept_new_calls` | calls hooks without `dataloader_idx` and `outputs` |
| `on_pretrain_routine_start` | calls this hook no more |

Runs are on the CPU and take `STEPS` steps. What they log, and the gradients of the first step, are written to
`numbers.json`.
"""
from __future__ import annotations

import argparse
import functools
import inspect
import json
import random
from collections import defaultdict
from typing import Any

import numpy
import PIL.Image
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger

from public_scripts.run import NUMBERS

STEPS = 2
SEED = 23
FLAGS = {"gpus": str, "max_epochs": int, "max_steps": int, "accumulate_grad_batches": int, "benchmark": bool,
         "precision": int, "resume_from_checkpoint": str, "num_nodes": int, "check_val_every_n_epoch": int}
DROPPED = ("gpus", "accelerator", "plugins", "resume_from_checkpoint", "num_nodes", "strategy")
OLD_HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
             "on_train_epoch_end", "on_validation_epoch_end")


def install() -> None:
    """Give Lightning its old names back, and record what runs log."""
    pl.plugins.DDPPlugin = argparse.Namespace
    pl.loggers.TestTubeLogger = pl.loggers.WandbLogger = QuietLogger
    PIL.Image.LINEAR = PIL.Image.Resampling.BILINEAR
    image_reader()
    for name in ("reset_peak_memory_stats", "synchronize"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.max_memory_allocated = lambda *_: 0
    pl.Trainer.root_gpu = None
    pl.Trainer.add_argparse_args = staticmethod(add_argparse_args)
    pl.Trainer.from_argparse_args = classmethod(from_argparse_args)
    pl.Trainer.__init__ = on_cpu(pl.Trainer.__init__)
    pl.Trainer.fit = recorded(pl.Trainer.fit)


def image_reader() -> None:
    """Let OpenCV's `imread` read images without OpenCV."""
    import cv2

    if not hasattr(cv2, "imread"):
        cv2.COLOR_BGR2RGB = cv2.COLOR_RGB2BGR
        cv2.imread = lambda path: numpy.array(PIL.Image.open(path).convert("RGB"))[:, :, ::-1]


class QuietLogger(Logger):
    """A logger that keeps nothing; scripts save their images themselves."""

    def __init__(self, name: str, save_dir: str, **_: Any) -> None:
        super().__init__()
        self.given_name, self.folder = name, save_dir

    name = property(lambda self: self.given_name)
    version = property(lambda self: 0)
    save_dir = property(lambda self: self.folder)
    experiment = property(lambda self: self)

    def add_image(self, *_: Any, **__: Any) -> None:
        """Accept an image."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Accept settings."""

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Accept numbers."""


# The trainer


def add_argparse_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the trainer's flags to a parser."""
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind)
    return parser


def from_argparse_args(cls: type[pl.Trainer], options: argparse.Namespace, **settings: Any) -> pl.Trainer:
    """Return a trainer for the flags of a command line."""
    return cls(**{**vars(options), **settings})


def on_cpu(build: Any) -> Any:
    """Return a constructor of trainers that takes settings of Lightning 1, and trains for a few steps on the CPU."""
    known = set(inspect.signature(build).parameters)

    @functools.wraps(build)
    def build_on_cpu(trainer: pl.Trainer, **settings: Any) -> None:
        given = {name: value for name, value in settings.items()
                 if name in known and name not in DROPPED and value is not None}
        build(trainer, **{**given, "accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 1,
                          "enable_progress_bar": False, "enable_model_summary": False})

    return build_on_cpu


def recorded(fit: Any) -> Any:
    """Return a `Trainer.fit` that seeds all generators, calls hooks of Lightning 1, and writes what was logged."""

    @functools.wraps(fit)
    def fit_and_record(trainer: pl.Trainer, model: pl.LightningModule, *args: Any, **options: Any) -> None:
        for owner in (model, *trainer.callbacks):
            accept_new_calls(owner)
            if hasattr(owner, "on_pretrain_routine_start"):
                owner.on_pretrain_routine_start(trainer, model)
        recorder = Recorder()
        trainer.callbacks.append(recorder)
        random.seed(SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        fit(trainer, model, *args, **options)
        recorder.write()

    return fit_and_record


def accept_new_calls(owner: pl.LightningModule | pl.Callback) -> None:
    """Let hooks with more parameters than Lightning 2 gives them be called."""
    for name in OLD_HOOKS:
        hook = getattr(owner, name, None)
        if hook is None:
            continue
        parameters = inspect.signature(hook).parameters.values()
        needed = sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)

        def call(*args: Any, hook: Any = hook, needed: int = needed) -> Any:
            return hook(*args, *[0] * (needed - len(args)))

        if type(owner).__module__.partition(".")[0] != "pytorch_lightning":
            setattr(owner, name, functools.wraps(hook)(call))


class Recorder(pl.Callback):
    """Keeps the losses of every step and the norms of the first step's gradients."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[float]] = defaultdict(list)

    def on_before_optimizer_step(self, trainer: pl.Trainer, model: pl.LightningModule, optimizer: Any) -> None:
        if not self.numbers["gradients"]:
            trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
            self.numbers["gradients"] = [float(parameter.grad.norm()) for _, parameter in
                                         sorted(model.named_parameters())
                                         if parameter.grad is not None and id(parameter) in trained]

    def on_train_batch_end(self, trainer: pl.Trainer, model: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.numbers["loss"].append(float(outputs["loss"]))
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/") and not name.endswith(("_step", "_epoch")):
                self.numbers[name].append(float(value))

    def write(self) -> None:
        with open(NUMBERS, "w") as file:
            json.dump(self.numbers, file)
