"""The rows of the base model's table: how each is measured, and its goal."""
from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from evaluation.metrics.scoring import stack_images
from evaluation.mini import parts
from evaluation.mini.settings import BaseModelSettings
from evaluation.mini.world_prompts import (
    FIRST_SEED,
    RecognitionResults,
    ScenePrompt,
    SceneRecognizer,
    reference_images,
    scene_prompts,
)
from evaluation.output.goals import GoalRow
from evaluation.output.table import write_csv
from evaluation.stats.intervals import Estimate, bootstrap_mean
from evaluation.sweeps.samples import generate_images
from ldm.checkpoints.load import load_model
from ldm.common.paths import PROJECT_ROOT
from ldm.data.contact_sheet import save_grid
from ldm.data.mini.scenes import SceneDataset
from ldm.inference.model_config import complete_settings, inference_defaults, read_model_config
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.util import pick_device

AUTOENCODER = PROJECT_ROOT / "configs" / "mini" / "autoencoder.yaml"
SHEET_IMAGES, SHEET_COLUMNS = 64, 8
GENERATED = "generated"
REFERENCES = {"known": False, "held-out": True}  # name of a ceiling -> whether its scenes have held-out sprites


class RecognizedImages(NamedTuple):
    """Prompts, and what was recognized in one image of each."""

    prompts: list[ScenePrompt]
    results: RecognitionResults

    def kind_accuracy(self) -> Estimate:
        """Return the percentage of images in which all kinds are recognized."""
        return bootstrap_mean(self.results.kind_hits(self.prompts))

    def background_accuracy(self) -> Estimate:
        """Return the percentage of images with the background that the prompt names."""
        return bootstrap_mean(self.results.background_hits(self.prompts))


class BaseModelEvaluator:
    """The parts that are measured, each loaded on first use.

    Raises:
        UserError: the config or the device cannot be used.
    """

    def __init__(self, settings: BaseModelSettings) -> None:
        self.settings, self.device = settings, pick_device(settings.model.device)
        self.config = read_model_config(settings.model.config)
        self.generation = GenerationSettings(num_inference_steps=settings.num_inference_steps,
                                             guidance_scale=settings.guidance_scale, sampler="ddim")
        complete_settings(self.generation, self.config, inference_defaults(self.config))  # refuses what cannot be
        self.records: list[dict[str, Any]] = []

    @functools.cached_property
    def pipeline(self) -> PerfusionPipeline:
        model = self.settings.model
        return PerfusionPipeline.from_config(self.config, model.checkpoint, self.device, model.precision,
                                            model.vae, model.text_encoder, model.loras)

    @functools.cached_property
    def recognizer(self) -> SceneRecognizer:
        return SceneRecognizer(ClipEncoder.from_path(self.settings.evaluation_clip, self.device))

    @property
    def first_stage(self) -> Any:
        """The first stage of the base model, or the one of --autoencoder."""
        if self.settings.autoencoder is None:
            return self.pipeline.model.first_stage_model
        return load_model(read_model_config(AUTOENCODER), self.settings.autoencoder, self.device)

    @property
    def held_out_scenes(self) -> SceneDataset:
        """Scenes of all appearances, styles and relations, with sprites that no model was trained on."""
        return SceneDataset(seed=FIRST_SEED + self.settings.seed, held_out=True)

    def generate(self, prompts: Sequence[ScenePrompt], name: str) -> Tensor:
        """Generate one image per prompt, (N, 3, H, W) in [-1, 1], and write a sheet of the first ones."""
        requests = [GenerationRequest(prompt.prompt, prompt.seed) for prompt in prompts]
        images = generate_images(self.pipeline, requests, settings=self.generation,
                                 batch_size=self.settings.batch_size, description=f"generating {name}")
        titles = [prompt.prompt for prompt in prompts[:SHEET_IMAGES]]
        save_grid(images[:SHEET_IMAGES], self.settings.outdir / f"{name}.png", SHEET_COLUMNS, titles)
        return stack_images(images)

    def recognize(self, num_subjects: int, name: str) -> tuple[RecognizedImages, dict[str, RecognizedImages]]:
        """Recognize what generated images show and, for the ceilings, what composed scenes show.

        Args:
            num_subjects: 1 or 2, in each image.
            name: name of the sheet of generated images.

        Returns:
            The generated images, and the composed scenes by the names in `REFERENCES`.
        """
        settings = self.settings
        prompts = scene_prompts(settings.prompts, settings.seed, num_subjects)
        generated = RecognizedImages(prompts, self.recognizer.recognize(self.generate(prompts, name), prompts))
        references: dict[str, RecognizedImages] = {}
        for reference, held_out in REFERENCES.items():
            scenes = scene_prompts(settings.scenes, settings.seed, num_subjects, held_out)
            results = self.recognizer.recognize(reference_images(scenes), scenes)
            references[reference] = RecognizedImages(scenes, results)

        for group, images in {GENERATED: generated, **references}.items():
            self.records += images.results.records(images.prompts, group)
        write_csv(settings.outdir / "recognized.csv", self.records, list(self.records[0]))
        return generated, references


def measure_autoencoder(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    values = parts.reconstruction_psnr(evaluator.first_stage, evaluator.held_out_scenes, evaluator.settings.scenes)
    yield GoalRow("autoencoder: PSNR on held-out scenes", bootstrap_mean(values), "dB", 30)


def measure_clip(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    clip = ClipEncoder.from_path(evaluator.settings.clip, evaluator.device)
    hits = parts.caption_hits(clip, evaluator.held_out_scenes, evaluator.settings.scenes)
    yield GoalRow("CLIP: top-1 of 64 captions for a held-out scene", bootstrap_mean(hits), "%", 90)


def measure_segmenter(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    segmenter = ZeroShotSegmenter.from_path(evaluator.settings.segmenter, evaluator.device)
    ious = parts.segmentation_ious(segmenter, evaluator.held_out_scenes, evaluator.settings.scenes)
    yield GoalRow("segmenter: mean IoU on held-out sprites", bootstrap_mean([100 * iou for iou in ious]), "%", 80)


def measure_one_subject(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    generated, references = evaluator.recognize(1, "one_subject")
    yield GoalRow("text-to-image, one subject: its kind recognized", generated.kind_accuracy(), "%", 90,
                  ceilings={name: images.kind_accuracy() for name, images in references.items()})
    yield GoalRow("text-to-image, one subject: background recognized", generated.background_accuracy(), "%", 95,
                  ceilings={name: images.background_accuracy() for name, images in references.items()})


def measure_two_subjects(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    generated, references = evaluator.recognize(2, "two_subjects")
    yield GoalRow("text-to-image, two subjects: both recognized", generated.kind_accuracy(), "%", 70,
                  ceilings={name: images.kind_accuracy() for name, images in references.items()})


def measure_speed(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    settings = evaluator.settings
    with tempfile.TemporaryDirectory() as folder:
        command = parts.generation_command(settings.model.config, settings.model.checkpoint, settings.guidance_scale,
                                           folder)
        seconds = Estimate(parts.time_command(command))
    yield GoalRow("4 images, 50 DDIM steps, guidance, CPU, 2 threads, start-up", seconds, "s", 15, at_most=True)


def measure_size(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    megabytes = Estimate(parts.weights_megabytes(evaluator.settings.weights))
    yield GoalRow("all weights", megabytes, "MB", 40, at_most=True)


# In the order of `evaluation.mini.settings.MEASUREMENTS`.
MEASURES: dict[str, Callable[[BaseModelEvaluator], Iterator[GoalRow]]] = {
    "autoencoder": measure_autoencoder, "clip": measure_clip, "segmenter": measure_segmenter,
    "one_subject": measure_one_subject, "two_subjects": measure_two_subjects, "speed": measure_speed,
    "size": measure_size}


def measure(evaluator: BaseModelEvaluator) -> Iterator[GoalRow]:
    """Yield the rows of the settings' measurements in the table's order, each as soon as it is measured."""
    for name, rows_of in MEASURES.items():
        if name in evaluator.settings.measurements:
            yield from rows_of(evaluator)
