"""What a user sees of concepts that are being learned: files, masks, and pictures before, during and after."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only

from ldm.cli.generation import DEFAULT_CONFIG
from ldm.common.errors import MemoryShortage, UserError
from ldm.common.paths import quote_command
from ldm.concepts.finetuned_concept import AnyConcept, save_concepts
from ldm.data.images import save_grid, to_tensor
from ldm.data.templates import fill
from ldm.inference.sampling import Job, Sampling, draw_pictures, encode_once, prompt_encoder, wants_sixteen_bits
from ldm.models.diffusion.samplers import sampler_class
from ldm.modules.segmentation import mask_overlay
from ldm.personalization.base import PersonalizationMethod

log = logging.getLogger(__name__)

SHEET = "before_during_after.png"


class ConceptSaver(pl.Callback):
    """Writes `concept.safetensors` into the log folder when training ends, also when it is interrupted.

    Several concepts get a file each, by their own names: `teddy.safetensors` for `<teddy>`.
    """

    def __init__(self, precision: str = "float16") -> None:
        self.precision = getattr(torch, precision)

    @rank_zero_only
    def save(self, trainer: pl.Trainer, model: PersonalizationMethod) -> list[Path]:
        names = model.names if len(model.names) > 1 else ["concept"]
        return [save_concepts(Path(trainer.default_root_dir) / f"{name}.safetensors", [model.export_concept(place)],
                             self.precision) for place, name in enumerate(names)]

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        paths = self.save(trainer, model)
        for path, word, category in zip(paths, model.placeholders, model.super_categories, strict=True):
            log.info("concept %s, a %s, after %d steps: %s (%.1f KB)", word, category, trainer.global_step, path,
                     path.stat().st_size / 1e3)
        log.info("next: python scripts/txt2img.py %s--concept %s%s --prompt %s", drawn_with(trainer), quote_command(*paths),
                 guided_by(trainer), " ".join(f'"a photo of a {word} on the beach"' for word in model.placeholders))


def guided_by(trainer: pl.Trainer) -> str:
    """The flag for the guidance that a run's own pictures have: models differ in how much they bear."""
    return next((f" --scale {one.scale:g}" for one in trainer.callbacks if isinstance(one, BeforeDuringAfter)), "")


def drawn_with(trainer: pl.Trainer) -> str:
    """The flag, if one is needed, for drawing with the base model and the covariance that a run has: its own config."""
    configs = sorted((Path(trainer.default_root_dir) / "configs").glob("*-project.yaml"))
    if not configs:
        return ""
    ours, *usual = (OmegaConf.load(path).model.params for path in (configs[-1], DEFAULT_CONFIG) if Path(path).is_file())
    same = usual and all(ours.get(key) == usual[0].get(key) for key in ("ckpt_path", "covariance"))
    return "" if same else f"--config {quote_command(configs[-1])} "


def drawn_now(model: PersonalizationMethod, concepts: Sequence[AnyConcept], jobs: Sequence[Job], **sampling: Any
              ) -> list[Image.Image]:
    """Pictures by a model that is being trained, under concepts as they are; `sampling` as for `Sampling`."""
    encoded = encode_once(prompt_encoder(model, concepts), [job.prompt for job in jobs])
    on_gpu = model.device.type == "cuda"  # its memory has to hold the training's as well
    settings = Sampling(model.latent_shape[1:], batch_size=1 if on_gpu else len(jobs),
                        autocast=wants_sixteen_bits(None, model.device), **sampling)
    return list(draw_pictures(model, encoded, jobs, settings))


class BeforeDuringAfter(pl.Callback):
    """Draws the same prompts and seeds before, during and after training, each a row of one growing sheet.

    Of several concepts each has its own sheet, in a folder of its name.

    Args:
        prompts: with `{}` where the concept's word goes; before training the super-category stands there.
        during: how many rows between the first and the last.
        steps, scale, sampler: of the sampling.
        seed: of the first picture; the next ones count on.
    """

    def __init__(self, prompts: Sequence[str], during: int = 1, steps: int = 20, scale: float = 6.0,
                 seed: int = 1, sampler: str = "dpm") -> None:
        if not prompts or steps < 1 or during < 0:
            raise UserError(f"BeforeDuringAfter: {len(prompts)} prompts, {steps} steps, {during} rows between; "
                            "give 1 or more prompts and steps, or leave the callback out")
        sampler_class(sampler)  # a wrong name is found before anything is trained
        self.prompts, self.during, self.steps, self.scale, self.seed = list(prompts), during, steps, scale, seed
        self.sampler = sampler
        self.sheets: dict[int, dict[str, list[Image.Image]]] = {}  # the place of a concept -> its rows
        self.last_step = -1

    def _due(self, trainer: pl.Trainer) -> bool:
        step, interval = trainer.global_step, max(1, trainer.max_steps // (self.during + 1))
        return 0 < step < trainer.max_steps and step % interval == 0 and step != self.last_step

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        for place, data in enumerate(model.photos()):
            self._show(place, "photos", data.images, trainer, model)
            if data.has_masks:
                overlays = [mask_overlay(image, data.mask(n)) for n, image in enumerate(data.images)]
                save_grid(overlays, self._folder(place, trainer, model) / "masks.png", columns=2)
        if not (trainer.global_step and model.trained_unet_weights()):  # then the U-Net is no more what it was before
            self._draw("before", trainer, model, learned=False)
        if trainer.global_step:
            self._draw(f"resumed at step {trainer.global_step}", trainer, model)

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, model: PersonalizationMethod, *_: object) -> None:
        if self._due(trainer):
            self._draw(f"step {trainer.global_step}", trainer, model)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        for saver in trainer.callbacks:
            if isinstance(saver, ConceptSaver):  # its turn comes later: what was learned is not to wait for pictures
                saver.save(trainer, model)
        name = "after" if trainer.global_step >= trainer.max_steps else f"stopped at step {trainer.global_step}"
        self._draw(name, trainer, model, learned=trainer.global_step > 0)
        for place in range(len(model.concepts)):
            log.info("pictures: %s", self._folder(place, trainer, model) / SHEET)

    def _draw(self, name: str, trainer: pl.Trainer, model: PersonalizationMethod, learned: bool = True) -> None:
        """Adds a row to every sheet, of concepts as they are or, where none is learned yet, of super-categories."""
        self.last_step = trainer.global_step
        training = model.training
        model.eval()
        for place, category in enumerate(model.super_categories):
            concepts = [model.export_concept(place)] if learned else []
            try:
                pictures = self._pictures(model, concepts, model.placeholders[place] if learned else category)
            except MemoryShortage as error:
                log.warning("no pictures of %s (%s): %s", model.names[place], name, error)
                continue
            self._log(place, pictures, trainer, model)
            self._show(place, name if learned else f"{name} ({category})", pictures, trainer, model)
        model.train(training)

    def _pictures(self, model: PersonalizationMethod, concepts: Sequence[AnyConcept], word: str) -> list[Image.Image]:
        jobs = [Job(fill(prompt, word), self.seed + number) for number, prompt in enumerate(self.prompts)]
        return drawn_now(model, concepts, jobs, steps=self.steps, scale=self.scale, sampler=self.sampler)

    def _show(self, place: int, name: str, images: Sequence[Image.Image], trainer: pl.Trainer,
              model: PersonalizationMethod) -> None:
        """Adds a row, filled up or cut to the number of prompts, and writes the sheet."""
        width, rows = len(self.prompts), self.sheets.setdefault(place, {})
        size = images[0].size
        rows[name] = [*images[:width], *(Image.new("RGB", size, "white") for _ in range(width - len(images)))]
        cells, titles = [], []
        for row, pictures in rows.items():
            cells += pictures
            titles += ["a photo" if row == "photos" else f"{row}: {fill(prompt, '…')}" for prompt in self.prompts]
        save_grid(cells, self._folder(place, trainer, model) / SHEET, width, titles)

    def _log(self, place: int, pictures: Sequence[Image.Image], trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        images = torch.stack([(to_tensor(picture) + 1) / 2 for picture in pictures])
        name = f"samples/{model.names[place]}" if len(model.names) > 1 else "samples"
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_images"):
                logger.experiment.add_images(name, images, trainer.global_step)

    @staticmethod
    def _folder(place: int, trainer: pl.Trainer, model: PersonalizationMethod) -> Path:
        folder = Path(trainer.default_root_dir) / "images"
        return folder / model.names[place] if len(model.names) > 1 else folder
