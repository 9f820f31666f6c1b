"""Write what users see of a concept run: concept files, masks, and previews before, during and after training."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only

from ldm.common.errors import FileNotWritten, MemoryShortage, UserError
from ldm.common.paths import resolve_path
from ldm.common.prompt_file import read_prompt_file
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.storage import save_concepts
from ldm.data.contact_sheet import save_grid
from ldm.data.images import to_tensor
from ldm.data.templates import fill_template
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.segmentation import mask_overlay
from ldm.personalization.base import PersonalizationMethod
from ldm.sampling.samplers import sampler_class

log = logging.getLogger(__name__)

SHEET = "before_during_after.png"


class ConceptSaver(pl.Callback):
    """Write `concept.safetensors` into the log folder when training ends, is interrupted or finds the disk full.

    In a run of no steps, whose concepts an encoder predicts, when it starts.

    Several concepts get one file each, by their own names: `teddy.safetensors` for `<teddy>`. If the training of some
    diverged, the others are saved; the end of the run then raises a UserError that names those that are not.

    Attributes:
        paths: the files written.
    """

    def __init__(self, precision: str = "float16") -> None:
        self.precision = getattr(torch, precision)
        self.paths: list[Path] = []
        self.refusals: list[str] = []

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        if trainer.max_steps == 0:
            self._save(trainer, model)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        self._save(trainer, model)

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, model: PersonalizationMethod, exception: BaseException) -> None:
        """Save what is learned so far if a file of the run could not be written: a concept takes much less room."""
        is_write_error = isinstance(exception, FileNotWritten | OSError)
        if is_write_error and trainer.global_step and not self.paths:
            self._save(trainer, model)
            for refusal in self.refusals:
                log.warning("not saved: %s", refusal)

    def _save(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        self.paths, self.refusals = [], []
        names = model.names if len(model.names) > 1 else ["concept"]
        for index, name in enumerate(names):
            path = Path(trainer.default_root_dir) / f"{name}.safetensors"
            try:
                save_concepts(path, [model.export_concept(index)], self.precision)
            except UserError as error:
                self.refusals.append(str(error))
                continue
            self.paths.append(path)
            log.info("concept %s, a %s, after %d steps: %s (%.1f KB)", model.placeholders[index],
                     model.super_categories[index], trainer.global_step, path, path.stat().st_size / 1e3)

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        if self.refusals:
            raise UserError("; ".join(self.refusals))


def generate_previews(model: PersonalizationMethod, concepts: Sequence[AnyConcept],
                      requests: Sequence[GenerationRequest], settings: GenerationSettings,
                      config: DictConfig | None = None) -> list[Image.Image]:
    """Generate images with a model in training, under the current state of its concepts.

    Raises:
        MemoryShortage: the device has no room beside the training.
    """
    # On a GPU one at a time: its memory has to hold the training as well.
    batch_size = 1 if model.device.type == "cuda" else len(requests)
    return list(PerfusionPipeline(model, config).generate(requests, settings, concepts, batch_size=batch_size))


class BeforeDuringAfter(pl.Callback):
    """Generate the same prompts and seeds before, during and after training, each time a row of one growing sheet.

    Each of several concepts has its own sheet, in a folder of its name.

    Args:
        prompts: with `{}` in place of the placeholder; before training, the super-category is filled in. Or a file of
            prompts, see `ldm.common.prompt_file`.
        during: number of rows between the first and the last.
        num_inference_steps: number of sampling steps.
        guidance_scale: guidance scale; None: the default from the section `inference` of the model's config.
        seed: seed of the first prompt's image; each further prompt adds 1.
        sampler: name of a sampler; None: the default, likewise.

    Attributes:
        config: the run's config; None: the model alone decides.

    Raises:
        UserError: there are no prompts, a number is out of range, or the sampler is unknown.
    """

    renamed_params: ClassVar[dict[str, str]] = {"steps": "num_inference_steps", "scale": "guidance_scale"}

    def __init__(self, prompts: Sequence[str] | str, during: int = 1, num_inference_steps: int = 20,
                 guidance_scale: float | None = None, seed: int = 1, sampler: str | None = "dpm") -> None:
        if isinstance(prompts, str):
            file = resolve_path(prompts)
            prompts = [prompt.text for prompt in read_prompt_file(file, f"previews: prompts: {prompts}")]
        if not prompts or num_inference_steps < 1 or during < 0:
            raise UserError(f"BeforeDuringAfter: {len(prompts)} prompts, {num_inference_steps} sampling steps, "
                            f"{during} rows between; give 1 or more prompts and steps, or leave the callback out")
        if sampler is not None:
            sampler_class(sampler)  # raises for an unknown name before anything is trained
        self.prompts, self.during, self.seed = list(prompts), during, seed
        self.settings = GenerationSettings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                                           sampler=sampler)
        self.config: DictConfig | None = None
        self.sheets: dict[int, dict[str, list[Image.Image]]] = {}  # concept index -> row title -> images
        self.last_step = -1

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step, interval = trainer.global_step, max(1, trainer.max_steps // (self.during + 1))
        return 0 < step < trainer.max_steps and step % interval == 0 and step != self.last_step

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        if trainer.max_steps == 0:  # Lightning then skips the training, with its start and end
            self.on_train_start(trainer, model)
            self._preview("from the photos", trainer, model)
            self._log_files(trainer, model)

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        for index, dataset in enumerate(model.photos()):
            self._add_row(index, "photos", dataset.images[:len(dataset.photos)], trainer, model)
            if dataset.has_masks or model.segmenter is not None:  # also if the segmenter finds nothing
                overlays = [mask_overlay(image, dataset.mask(photo)) for photo, image in enumerate(dataset.images)]
                save_grid(overlays, self._folder(index, trainer, model) / "masks.png", columns=2)
        # A resumed run that trains the U-Net no longer has the base model's weights.
        if not (trainer.global_step and model.trained_unet_weights()):
            self._preview("before", trainer, model, with_concepts=False)
        if trainer.global_step:
            self._preview(f"resumed at step {trainer.global_step}", trainer, model)

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, model: PersonalizationMethod, *_: object) -> None:
        if self._is_due(trainer):
            self._preview(f"step {trainer.global_step}", trainer, model)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        title = "after" if trainer.global_step >= trainer.max_steps else f"stopped at step {trainer.global_step}"
        self._preview(title, trainer, model, with_concepts=trainer.global_step > 0)
        self._log_files(trainer, model)

    def _log_files(self, trainer: pl.Trainer, model: PersonalizationMethod) -> None:
        for index in range(len(model.concepts)):
            log.info("previews: %s", self._folder(index, trainer, model) / SHEET)

    def _preview(self, title: str, trainer: pl.Trainer, model: PersonalizationMethod, with_concepts: bool = True
                 ) -> None:
        """Add a row to every sheet: of the concepts in their current state or, before training, of super-categories."""
        self.last_step = trainer.global_step
        was_training = model.training
        model.eval()
        for index, super_category in enumerate(model.super_categories):
            concepts = [model.export_concept(index)] if with_concepts else []
            if not all(map(_is_finite, concepts)):
                log.warning("no previews of %s (%s): its training has diverged", model.names[index], title)
                continue
            try:
                images = self._generate(model, concepts, model.placeholders[index] if with_concepts else super_category)
            except MemoryShortage as error:
                log.warning("no previews of %s (%s): %s", model.names[index], title, error)
                continue
            self._log_images(index, images, trainer, model)
            self._add_row(index, title if with_concepts else f"{title} ({super_category})", images, trainer, model)
        model.train(was_training)

    def _generate(self, model: PersonalizationMethod, concepts: Sequence[AnyConcept], word: str) -> list[Image.Image]:
        requests = [GenerationRequest(fill_template(prompt, word), self.seed + number)
                    for number, prompt in enumerate(self.prompts)]
        return generate_previews(model, concepts, requests, self.settings, self.config)

    def _add_row(self, index: int, title: str, images: Sequence[Image.Image], trainer: pl.Trainer,
                 model: PersonalizationMethod) -> None:
        """Add a row, padded or cut to the number of prompts, and write the sheet."""
        width, rows = len(self.prompts), self.sheets.setdefault(index, {})
        blank = Image.new("RGB", images[0].size, "white")
        rows[title] = [*images[:width], *[blank] * (width - len(images))]
        cells: list[Image.Image] = []
        titles: list[str] = []
        for row_title, row in rows.items():
            cells += row
            for prompt in self.prompts:
                titles.append("a photo" if row_title == "photos" else f"{row_title}: {fill_template(prompt, '…')}")
        save_grid(cells, self._folder(index, trainer, model) / SHEET, width, titles)

    @staticmethod
    def _log_images(index: int, images: Sequence[Image.Image], trainer: pl.Trainer, model: PersonalizationMethod
                    ) -> None:
        batch = torch.stack([(to_tensor(image) + 1) / 2 for image in images])
        name = f"samples/{model.names[index]}" if len(model.names) > 1 else "samples"
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_images"):
                logger.experiment.add_images(name, batch, trainer.global_step)

    @staticmethod
    def _folder(index: int, trainer: pl.Trainer, model: PersonalizationMethod) -> Path:
        folder = Path(trainer.default_root_dir) / "images"
        return folder / model.names[index] if len(model.names) > 1 else folder


def _is_finite(concept: AnyConcept) -> bool:
    return all(bool(tensor.isfinite().all()) for _, tensor in concept.tensors())
