"""Sweeps over settings: curves of points, and the scores of each point's images.

Every curve runs over the bias. A sweep is a set of curves that differ in one other thing: file and lock, layers,
temperature, or guidance. A point that several curves share is generated once. All points have the same prompts and
seeds, so they differ in nothing but the settings.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from evaluation.metrics.registry import METRICS, Scores
from evaluation.metrics.scoring import ConceptScorer, estimate_means
from evaluation.prompts.prompt_sets import EvaluationPrompt
from evaluation.stats.intervals import Estimate
from evaluation.sweeps.samples import BATCH_SIZE, generate_images
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.data.images import crop_square
from ldm.inference.auto_bias import BiasTrial, balanced
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import requests_for
from ldm.inference.settings import GenerationSettings

IS_GLOBAL = {"local": False, "global": True}  # lock -> whether it is global locking
MIN_POINTS_TO_BALANCE = 3  # with two biases, one has the most of the prompt and the other the most of the concept


@dataclass(frozen=True, eq=False)
class Source:
    """A concept and the name of its file in tables."""

    label: str
    concept: AnyConcept

    @property
    def has_gate(self) -> bool:
        """Whether there is a bias to sweep; concepts of other methods than Perfusion are single points."""
        return isinstance(self.concept, Concept)

    @property
    def lock(self) -> str | None:
        """The kind of its keys without global locking: "local" or "trained"; None for other methods."""
        if not self.has_gate:
            return None
        return "trained" if self.concept.target_outputs_k else "local"


@dataclass(frozen=True)
class Point:
    """A concept with the settings that its images are generated with."""

    source: Source
    settings: GenerationSettings

    @property
    def label(self) -> str:
        """The bias in words; empty if there is none."""
        return "" if self.settings.bias is None else f"bias {self.settings.bias:g}"

    @property
    def summary(self) -> str:
        """All settings in one line."""
        parts = []
        for name, value in self.record().items():
            if value is not None:
                parts.append(f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}")
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """Return the settings for a CSV file."""
        concept, settings = self.source.concept, self.settings
        temperature = settings.temperature
        if temperature is None:
            temperature = getattr(concept, "temperature", None)
        return {"concept": self.source.label, "bias": settings.bias, "temperature": temperature,
                "lock": "global" if settings.global_locking else self.source.lock,
                "layers": "all" if settings.all_layers else None, "guidance_scale": settings.guidance_scale}


@dataclass(frozen=True)
class Curve:
    """Points that differ in the bias, or a single point."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sweep:
    """Curves to compare.

    Attributes:
        key: names the files of the sweep.
        title: stands above its table and plots.
        curves: one or more.
    """

    key: str
    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class PointResult:
    """The scores of the images of a point.

    Attributes:
        scores: scores of all images, prompt by prompt.
        images: the image of the first seed of each prompt.
    """

    scores: Sequence[Scores]
    images: Sequence[Image.Image]

    def estimates(self) -> dict[str, Estimate]:
        """Return the mean of each metric, with an interval from resampling prompts."""
        seeds = len(self.scores) // len(self.images)
        prompts = np.repeat(np.arange(len(self.images)), seeds)
        return estimate_means(self.scores, prompts.tolist())


def build_sweeps(sources: Sequence[Source], settings: GenerationSettings, biases: Sequence[float],
                 locks: Sequence[str] = ("local",), temperatures: Sequence[float] = (),
                 guidance_scales: Sequence[float] = ()) -> list[Sweep]:
    """Build a sweep over files and locks, and with the first file that has a gate, one over each of the others.

    If that concept uses some of its layers only, one sweep compares these layers with all layers.

    Args:
        sources: concepts of one subject.
        settings: complete ones, for everything that is not swept. Their guidance scale, and the concept's own
            temperature, are among the values that are swept.
        biases: the points of each curve.
        locks: for concepts with locked keys; trained keys have no other choice.
        temperatures, guidance_scales: an empty one leaves out the sweep.
    """
    lock_curves = []
    for source in sources:
        for lock in locks if source.lock == "local" else ("local",):
            name = _lock_curve_name(source, lock, len(sources) > 1)
            lock_curves.append(_curve(name, source, replace(settings, global_locking=IS_GLOBAL[lock]), biases))
    sweeps = [Sweep("lock", "Lock of the keys", tuple(lock_curves))]

    first = next((source for source in sources if source.has_gate), sources[0])
    settings = replace(settings, global_locking=IS_GLOBAL[locks[0]] and first.lock == "local")
    if getattr(first.concept, "used_layers", None):
        sweeps.append(Sweep("layers", "Layers", tuple(
            _curve(name, first, replace(settings, all_layers=all_layers), biases)
            for name, all_layers in (("layers of its own", False), ("all layers", True)))))
    if temperatures:
        own = first.concept.temperature
        sweeps.append(Sweep("temperature", "Temperature", tuple(
            _curve(f"temperature {value:g}", first,
                   replace(settings, temperature=None if value == own else value), biases)
            for value in sorted({*temperatures, own}))))
    if guidance_scales:
        sweeps.append(Sweep("guidance", "Guidance", tuple(
            _curve(f"guidance {value:g}", first, replace(settings, guidance_scale=value), biases)
            for value in sorted({*guidance_scales, settings.guidance_scale}))))
    return sweeps


def distinct_points(sweeps: Sequence[Sweep]) -> list[Point]:
    """Return each point once, in order."""
    return list(dict.fromkeys(point for sweep in sweeps for curve in sweep.curves for point in curve.points))


class SweepRunner:
    """Generates and scores the images of points.

    Args:
        pipeline: generates.
        scorer: scores.
        prompts, seeds: each point has one image for each prompt and seed.
        side: side of the squares that are scored, in pixels.
        super_category: replaces the concept's word in texts.
        batch_size: images generated at a time.
    """

    def __init__(self, pipeline: PerfusionPipeline, scorer: ConceptScorer, prompts: Sequence[EvaluationPrompt],
                 seeds: Sequence[int], side: int, super_category: str, batch_size: int = BATCH_SIZE) -> None:
        self.pipeline, self.scorer, self.side, self.batch_size = pipeline, scorer, side, batch_size
        self.prompts, self.seeds, self.super_category = prompts, seeds, super_category

    @property
    def texts(self) -> list[str]:
        """The text of each image of a point, in plain words."""
        return [prompt.fill(self.super_category) for prompt in self.prompts for _ in self.seeds]

    def run(self, point: Point) -> PointResult:
        """Generate and score all images of a point.

        Raises:
            UserError: as `PerfusionPipeline.generate`.
        """
        concept = point.source.concept
        requests = requests_for([prompt.fill(concept.placeholder) for prompt in self.prompts], self.seeds)
        images = generate_images(self.pipeline, requests, [concept], point.settings, self.batch_size,
                                 point.label or point.source.label)
        scores = self.scorer.score_all((crop_square(image, self.side) for image in images), self.texts)
        return PointResult(scores, images[::len(self.seeds)])

    def records(self, results: Mapping[Point, PointResult]) -> Iterator[dict[str, Any]]:
        """Yield a record for each image, for a CSV file."""
        origins = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for point, result in results.items():
            for (prompt, seed), text, scores in zip(origins, self.texts, result.scores, strict=True):
                yield {**point.record(), "category": prompt.category, "text": text, "seed": seed,
                       **{metric.column: scores[metric.name] for metric in METRICS}}


def balanced_point(curve: Curve, results: Mapping[Point, PointResult]) -> Point | None:
    """Return the point of a curve that `--bias auto` would choose; None if the curve is too short to have a middle."""
    if len(curve.points) < MIN_POINTS_TO_BALANCE:
        return None
    trials = []
    for point in curve.points:
        result = results[point]
        texts, likenesses = (np.array([score[name] for score in result.scores]) for name in ("text", "image"))
        trials.append(BiasTrial.of_images(point.settings.bias, texts, likenesses, len(result.images)))
    chosen = balanced(trials, curve.points[0].source.concept.bias)
    return curve.points[trials.index(chosen)]


def _curve(name: str, source: Source, settings: GenerationSettings, biases: Sequence[float]) -> Curve:
    points = [replace(settings, bias=bias) for bias in biases] if source.has_gate else [settings]
    return Curve(name, tuple(Point(source, one) for one in points))


def _lock_curve_name(source: Source, lock: str, several_files: bool) -> str:
    """Return the name of a curve in the sweep over files and locks."""
    if not source.has_gate:
        return source.label
    keys = "trained keys" if source.lock == "trained" else f"{lock} lock"
    return f"{source.label}, {keys}" if several_files and source.label != keys else keys
