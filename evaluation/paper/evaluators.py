"""The models that generate images and measure them, and what they record of each image."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from evaluation.metrics.scoring import ConceptScorer, stack_images
from evaluation.mini.fidelity import (
    ExampleSubject,
    Position,
    SubjectFidelity,
    first_subject_position,
    keeps_attributes,
)
from evaluation.mini.own_kind import OwnKindRecognizer
from evaluation.mini.world_prompts import SceneRecognizer
from evaluation.paper.examples import ConceptPair, ExampleConcept, concept_names
from evaluation.paper.file_keys import content_digests, short_key
from evaluation.paper.prompt_cases import PromptCase
from evaluation.paper.source_digest import EVALUATION_ENTRIES, code_digest, config_targets
from ldm.data.images import crop_square, load_folder
from ldm.inference.model_config import read_model_config, segmenter_of
from ldm.inference.pipeline import PerfusionPipeline
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import ZeroShotSegmenter

Record = dict[str, Any]
TEXT_COLUMNS = ("prompt", "template", "recognized", "background", "left", "right")  # the others are numbers


class Evaluators:
    """The base model and the models that measure its images, each loaded when it is first needed.

    Args:
        config: config of the base model.
        evaluation_clip: folder or name of the CLIP that measures.
        checkpoint: weights of the base model; None: those that the config names.
        device, precision: as for `PerfusionPipeline`.
        batch_size: images generated at a time.
    """

    def __init__(self, config: str, evaluation_clip: str | Path, checkpoint: str | None = None,
                 device: str | None = None, batch_size: int = 32, precision: str | None = None) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.device, self.precision = device, precision
        self.evaluation_clip, self.batch_size = evaluation_clip, batch_size

    @functools.cached_property
    def key(self) -> str:
        """The key of the base model, of all models that measure, and of the code."""
        model = OmegaConf.to_container(read_model_config(self.config).model, resolve=True)
        paths = [None if path is None else str(path) for path in (self.evaluation_clip, self.checkpoint)]
        files = content_digests(model, *paths, model["params"].get("ckpt_path"))
        code = code_digest((*EVALUATION_ENTRIES, *config_targets(model)))
        return short_key([model, paths, self.precision, files, code])

    @functools.cached_property
    def pipeline(self) -> PerfusionPipeline:
        """Generates the images."""
        return PerfusionPipeline.from_config(self.config, self.checkpoint, self.device, self.precision)

    @functools.cached_property
    def clip(self) -> ClipEncoder:
        """Embeds images and texts."""
        return ClipEncoder.from_path(self.evaluation_clip, self.pipeline.device)

    @functools.cached_property
    def world(self) -> SceneRecognizer:
        """Recognizes backgrounds of the mini world."""
        return SceneRecognizer(self.clip)

    @functools.cached_property
    def fidelity(self) -> SubjectFidelity:
        """Recognizes example concepts by their attributes."""
        return SubjectFidelity(self.clip, self.pipeline.image_size[0])

    @functools.cached_property
    def own_kinds(self) -> OwnKindRecognizer:
        """Recognizes whether example concepts beside another subject keep their kind."""
        return OwnKindRecognizer(self.clip, self.pipeline.image_size[0])

    @functools.cached_property
    def segmenter(self) -> ZeroShotSegmenter:
        """Finds objects in images."""
        return ZeroShotSegmenter.from_path(segmenter_of(self.pipeline.config), self.pipeline.device)

    @functools.cache  # noqa: B019 - there is one instance for the whole run
    def scorer(self, example: ExampleConcept) -> ConceptScorer:
        """Return the scorer that compares images with the photos of an example."""
        photos = [crop_square(photo, self.pipeline.image_size[0]) for _, photo in load_folder(example.folder)]
        return ConceptScorer(self.clip, stack_images(photos), example.super_category, self.segmenter)

    def measure(self, images: Sequence[Image.Image], cases: Sequence[PromptCase], target: ExampleConcept | ConceptPair
                ) -> list[Record]:
        """Return a record of each image of a target, given the prompt of each image."""
        if isinstance(target, ConceptPair):
            return self._measure_pairs(images, target)
        return self._measure_concept(images, cases, target)

    def _measure_concept(self, images: Sequence[Image.Image], cases: Sequence[PromptCase], example: ExampleConcept
                         ) -> list[Record]:
        batch = stack_images(images)
        scores = self.scorer(example)(batch, [case.text for case in cases])
        positions = [first_subject_position(case.text) for case in cases]
        subjects = self.fidelity.classify(batch, positions)
        attributes = [_attribute_record(subject, example, keeps_attributes(case.text), position is not None)
                      for case, subject, position in zip(cases, subjects, positions, strict=True)]
        kinds = self._measure_kinds(batch, positions, attributes, example)
        backgrounds = self.world.recognize_backgrounds(batch)
        records = []
        for index, (case, background) in enumerate(zip(cases, backgrounds, strict=True)):
            is_correct = _percent(background == case.background) if case.background else None
            records.append({**scores[index], **attributes[index], "own_kind": kinds[index],
                            "recognized": subjects[index].label, "background_correct": is_correct,
                            "background": background})
        return records

    def _measure_kinds(self, images: Tensor, positions: Sequence[Position | None], attributes: Sequence[Record],
                       example: ExampleConcept) -> list[float | None]:
        """Return 100 or 0: whether the concept keeps its kind beside another subject; None where it need not."""
        besides = [index for index, record in enumerate(attributes) if record["attributes_beside"] is not None]
        own = self.own_kinds.is_own_kind(example.name, images[besides], [positions[index] for index in besides])
        kinds: list[float | None] = [None] * len(images)
        for index, is_own in zip(besides, own, strict=True):
            kinds[index] = _percent(is_own)
        return kinds

    def _measure_pairs(self, images: Sequence[Image.Image], pair: ConceptPair) -> list[Record]:
        names = {*concept_names(pair)}
        super_categories = sorted(concept.super_category for concept in pair.concepts)
        records = []
        for left, right in self.fidelity.classify_pairs(stack_images(images)):
            recognized = {left.concept, right.concept}
            records.append({
                "super_categories": _percent(sorted((left.kind, right.kind)) == super_categories),
                "attributes": _percent(recognized == names), "any_attributes": _percent(recognized & names),
                "left": left.label, "right": right.label})
        return records


def _attribute_record(subject: ExampleSubject, example: ExampleConcept, applies: bool, is_beside: bool) -> Record:
    """Record whether an image shows a concept's attributes, and whether it shows the exact sprite of its photos.

    Args:
        applies: False if the prompt asks for other attributes; all values are None then.
        is_beside: whether another subject stands beside the concept; `attributes_beside` is None if not.
    """
    if not applies:
        return {"attributes": None, "exact_match": None, "attributes_beside": None}
    has_attributes = subject.concept == example.name
    shown = _percent(has_attributes)
    return {"attributes": shown, "exact_match": _percent(has_attributes and subject.held_out),
            "attributes_beside": shown if is_beside else None}


def _percent(condition: object) -> float:
    return 100.0 if condition else 0.0
