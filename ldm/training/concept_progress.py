"""What a user sees of a concept that is being learned: its file, its masks, and pictures before, during and after."""
from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only

from ldm.data.images import save_grid, to_tensor
from ldm.data.templates import fill
from ldm.errors import UserError
from ldm.inference import Job, Sampling, draw_pictures, encode_once, prompt_encoder
from ldm.models.diffusion.concept_learner import ConceptLearner
from ldm.modules.segmentation import mask_overlay
from ldm.modules.tuned_concept import Learned, save_learned

log = logging.getLogger(__name__)


class ConceptSaver(pl.Callback):
    """Writes `concept.safetensors` into the log folder when training ends, also when it is interrupted."""

    def __init__(self, precision: str = "float16") -> None:
        self.precision = getattr(torch, precision)

    @rank_zero_only
    def save(self, trainer: pl.Trainer, model: ConceptLearner) -> Path:
        return save_learned(Path(trainer.default_root_dir) / "concept.safetensors", [model.learned()], self.precision)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: ConceptLearner) -> None:
        path = self.save(trainer, model)
        log.info("concept %s, a %s, after %d steps: %s (%.1f KB)", model.placeholder, model.super_category,
                 trainer.global_step, path, path.stat().st_size / 1e3)
        log.info('next: python scripts/txt2img.py --concept %s --prompt "a photo of a %s on the beach"',
                 shlex.quote(str(path)), model.placeholder)


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
        if not prompts or steps < 1 or during < 0:
            raise UserError(f"BeforeDuringAfter: {len(prompts)} prompts, {steps} steps, {during} rows between; "
                            "give 1 or more prompts and steps, or leave the callback out")
        self.prompts, self.during, self.steps, self.scale, self.seed = list(prompts), during, steps, scale, seed
        self.rows: dict[str, list[Image.Image]] = {}
        self.last_step = -1

    def _due(self, trainer: pl.Trainer) -> bool:
        step, interval = trainer.global_step, max(1, trainer.max_steps // (self.during + 1))
        return 0 < step < trainer.max_steps and step % interval == 0 and step != self.last_step

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, model: ConceptLearner) -> None:
        data = trainer.datamodule.datasets["train"]
        self._show("photos", data.images, trainer)
        if data.has_masks:
            overlays = [mask_overlay(image, data.mask(n)) for n, image in enumerate(data.images)]
            save_grid(overlays, self._folder(trainer) / "masks.png", columns=2)
        if not (trainer.global_step and model.tuned_weights()):  # then the U-Net is no more what it was before
            self._draw(f"before ({model.super_category})", [], trainer, model)
        if trainer.global_step:
            self._draw(f"resumed at step {trainer.global_step}", [model.learned()], trainer, model)

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, model: ConceptLearner, *_: object) -> None:
        if self._due(trainer):
            self._draw(f"step {trainer.global_step}", [model.learned()], trainer, model)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: ConceptLearner) -> None:
        name = "after" if trainer.global_step >= trainer.max_steps else f"stopped at step {trainer.global_step}"
        self._draw(name, [model.learned()] if trainer.global_step else [], trainer, model)
        log.info("pictures: %s", self._folder(trainer) / "before_during_after.png")

    def _draw(self, name: str, concepts: Sequence[Learned], trainer: pl.Trainer, model: ConceptLearner) -> None:
        self.last_step = trainer.global_step
        prompts = [fill(prompt, model.placeholder if concepts else model.super_category) for prompt in self.prompts]
        training = model.training
        model.eval()
        encoded = encode_once(prompt_encoder(model, concepts), prompts)
        sampling = Sampling(model.latent_shape[1:], self.steps, self.scale, batch_size=len(prompts))
        jobs = [Job(prompt, self.seed + number) for number, prompt in enumerate(prompts)]
        pictures = list(draw_pictures(model, encoded, jobs, sampling))
        model.train(training)
        self._log(pictures, trainer)
        self._show(name, pictures, trainer)

    def _show(self, name: str, images: Sequence[Image.Image], trainer: pl.Trainer) -> None:
        """Adds a row, filled up or cut to the number of prompts, and writes the sheet."""
        width = len(self.prompts)
        size = images[0].size
        self.rows[name] = [*images[:width], *(Image.new("RGB", size, "white") for _ in range(width - len(images)))]
        cells, titles = [], []
        for row, pictures in self.rows.items():
            cells += pictures
            titles += ["a photo" if row == "photos" else f"{row}: {fill(prompt, '…')}" for prompt in self.prompts]
        save_grid(cells, self._folder(trainer) / "before_during_after.png", width, titles)

    def _log(self, pictures: Sequence[Image.Image], trainer: pl.Trainer) -> None:
        images = torch.stack([(to_tensor(picture) + 1) / 2 for picture in pictures])
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_images"):
                logger.experiment.add_images("samples", images, trainer.global_step)

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "images"
