"""What a user sees of a concept that is being learned: its file, its masks, and pictures before, during and after."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from ldm.data.images import from_tensor, save_grid
from ldm.data.templates import fill
from ldm.models.diffusion.perfusion import Perfusion
from ldm.modules.concept import save_concepts
from ldm.modules.segmentation import mask_overlay

log = logging.getLogger(__name__)


class ConceptSaver(pl.Callback):
    """Writes `concept.safetensors` into the log folder when training ends, also when it is interrupted."""

    def __init__(self, precision: str = "float16") -> None:
        self.precision = getattr(torch, precision)

    @rank_zero_only
    def save(self, trainer: pl.Trainer, model: Perfusion) -> Path:
        return save_concepts(Path(trainer.default_root_dir) / "concept.safetensors", [model.learned()], self.precision)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: Perfusion) -> None:
        path = self.save(trainer, model)
        log.info("concept %s, a %s, after %d steps: %s (%.1f KB)", model.placeholder, model.super_category,
                 trainer.global_step, path, path.stat().st_size / 1e3)
        log.info('next: python scripts/txt2img.py --concept %s --prompt "a photo of a %s on the beach"', path,
                 model.placeholder)


class BeforeDuringAfter(pl.Callback):
    """Draws the same prompts and seeds before, during and after training, each a row of one growing sheet.

    Args:
        prompts: with `{}` where the concept's word goes; before training the super-category stands there.
        during: how many rows between the first and the last.
        steps, scale: of the sampling.
        seed: of the first picture; the next ones count on.
    """

    def __init__(self, prompts: Sequence[str], during: int = 1, steps: int = 25, scale: float = 6.0,
                 seed: int = 1) -> None:
        self.prompts, self.during, self.steps, self.scale, self.seed = list(prompts), during, steps, scale, seed
        self.rows: dict[str, list[Image.Image]] = {}

    def _due(self, trainer: pl.Trainer) -> bool:
        interval = max(1, trainer.max_steps // (self.during + 1))
        return trainer.global_step % interval == 0 and trainer.global_step < trainer.max_steps

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, model: Perfusion) -> None:
        data = trainer.datamodule.datasets["train"]
        self._show("photos", data.images, trainer)
        if data.has_masks:
            overlays = [mask_overlay(image, data.mask(n)) for n, image in enumerate(data.images)]
            save_grid(overlays, self._folder(trainer) / "masks.png", columns=2)
        self._draw(f"before ({model.super_category})" if not trainer.global_step else
                   f"resumed at step {trainer.global_step}", trainer, model)

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, model: Perfusion, *_: object) -> None:
        if self._due(trainer):
            self._draw(f"step {trainer.global_step}", trainer, model)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: Perfusion) -> None:
        self._draw("after" if trainer.global_step >= trainer.max_steps else f"stopped at step {trainer.global_step}",
                   trainer, model)
        log.info("pictures: %s", self._folder(trainer) / "before_during_after.png")

    def _draw(self, name: str, trainer: pl.Trainer, model: Perfusion) -> None:
        started = trainer.global_step > 0
        word = model.placeholder if started else model.super_category
        training = model.training
        model.eval()
        images = model.draw([fill(prompt, word) for prompt in self.prompts], [model.learned()] if started else [],
                            list(range(self.seed, self.seed + len(self.prompts))), self.steps, self.scale)
        model.train(training)
        self._log(name, images, trainer)
        self._show(name, [from_tensor(image) for image in images], trainer)

    def _show(self, name: str, images: Sequence[Image.Image], trainer: pl.Trainer) -> None:
        """Adds a row, filled up or cut to the number of prompts, and writes the sheet."""
        width = len(self.prompts)
        size = images[0].size
        self.rows[name] = [*images[:width], *(Image.new("RGB", size, "white") for _ in range(width - len(images)))]
        cells, titles = [], []
        for row, pictures in self.rows.items():
            cells += pictures
            titles += [f"{row}: {prompt}" if row != "photos" else row for prompt in self.prompts]
        save_grid(cells, self._folder(trainer) / "before_during_after.png", width, titles)

    def _log(self, name: str, images: Tensor, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_images"):
                logger.experiment.add_images("samples", (images + 1) / 2, trainer.global_step)

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "images"
