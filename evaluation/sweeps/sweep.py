"""Sweeps over how concepts are drawn: the curves of settings, and what the pictures of each setting reach.

Every curve runs over the bias. A sweep is some curves that differ in one other thing: file and lock, temperature, or
guidance. What several curves share is drawn once. All settings have the same prompts and seeds, so that what differs is
the setting alone.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from evaluation.metrics.captioned_images import measured
from evaluation.metrics.similarity import Similarity, SimilarityMeter, figures_of
from evaluation.prompts.prompt_sets import EvaluationPrompt
from evaluation.stats.intervals import Estimate
from evaluation.sweeps.samples import Manner, Painter, jobs_of
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.data.images import crop_square
from ldm.inference.auto_bias import Tried, balanced

LOCKS = {"local": False, "global": True}
FEWEST_TO_BALANCE = 3  # biases: at two, one is the most of the prompt and the other the most of the concept


@dataclass(frozen=True, eq=False)
class Source:
    """A concept and what its file is called."""

    label: str
    concept: AnyConcept

    @property
    def has_gate(self) -> bool:
        """Whether there is a bias to sweep: concepts of other methods are single points."""
        return isinstance(self.concept, Concept)

    @property
    def lock(self) -> str | None:
        """What its keys are, unless those of the whole prompt are locked: "local" or "trained"."""
        return ("trained" if self.concept.target_outputs_k else "local") if self.has_gate else None


@dataclass(frozen=True)
class Point:
    """A concept drawn in one manner."""

    source: Source
    manner: Manner

    @property
    def label(self) -> str:
        return "" if self.manner.bias is None else f"bias {self.manner.bias:g}"

    @property
    def summary(self) -> str:
        """All of it in a few words."""
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in self.record().items()}
        return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)

    def record(self) -> dict[str, Any]:
        """Its columns in a CSV file."""
        concept, manner = self.source.concept, self.manner
        temperature = getattr(concept, "temperature", None) if manner.temperature is None else manner.temperature
        lock = "global" if manner.global_locking else self.source.lock
        return {"concept": self.source.label, "bias": manner.bias, "temperature": temperature, "lock": lock,
                "layers": "all" if manner.all_layers else None, "scale": manner.scale}


@dataclass(frozen=True)
class Curve:
    """Points that differ in the bias, or a single one."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sweep:
    """Curves to be compared; `key` names its files."""

    key: str
    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Drawn:
    """What the pictures of one point reach, prompt by prompt, and the first seed's picture of each prompt."""

    found: Sequence[Similarity]
    pictures: Sequence[Image.Image]

    def figures(self) -> dict[str, Estimate]:
        """The mean of each kind of similarity, its interval by resampling prompts: seeds of one belong together."""
        prompts = np.repeat(np.arange(len(self.pictures)), len(self.found) // len(self.pictures))
        return figures_of(self.found, prompts.tolist())


def sweeps_of(sources: Sequence[Source], manner: Manner, biases: Sequence[float], locks: Sequence[str] = ("local",),
              temperatures: Sequence[float] = (), scales: Sequence[float] = ()) -> list[Sweep]:
    """A sweep over files and locks, and with the first file of a gate, and the first lock, one over each of the others.

    Where that concept uses some of its layers only, there is one over using these or all.

    Args:
        manner: what is not swept; its guidance, and a concept's own temperature, are among those swept over.
        locks: of concepts with locked keys; trained ones are left as they are.
        temperatures, scales: none leave out the sweep.
    """
    locked = [_curve(_name(source, lock, len(sources) > 1), source, replace(manner, global_locking=LOCKS[lock]), biases)
              for source in sources for lock in (locks if source.lock == "local" else ("local",))]
    made = [Sweep("lock", "Lock of the keys", tuple(locked))]
    first = next((source for source in sources if source.has_gate), sources[0])
    manner = replace(manner, global_locking=LOCKS[locks[0]] and first.lock == "local")
    if getattr(first.concept, "used_layers", None):
        made.append(Sweep("layers", "Layers", tuple(
            _curve(name, first, replace(manner, all_layers=every), biases)
            for name, every in (("layers of its own", False), ("all layers", True)))))
    if temperatures:
        own = first.concept.temperature
        made.append(Sweep("temperature", "Temperature", tuple(
            _curve(f"temperature {value:g}", first,
                   replace(manner, temperature=None if value == own else value), biases)
            for value in sorted({*temperatures, own}))))
    if scales:
        made.append(Sweep("guidance", "Guidance", tuple(
            _curve(f"guidance {value:g}", first, replace(manner, scale=value), biases)
            for value in sorted({*scales, manner.scale}))))
    return made


def points_of(sweeps: Sequence[Sweep]) -> list[Point]:
    """Each once, in order."""
    return list(dict.fromkeys(point for sweep in sweeps for curve in sweep.curves for point in curve.points))


class Sweeper:
    """Draws and measures points.

    Args:
        side: of the squares that are measured, in pixels.
        super_category: what the concept's word is in texts.
    """

    def __init__(self, painter: Painter, meter: SimilarityMeter, prompts: Sequence[EvaluationPrompt],
                 seeds: Sequence[int], side: int, super_category: str) -> None:
        self.painter, self.meter, self.side = painter, meter, side
        self.prompts, self.seeds, self.super_category = prompts, seeds, super_category

    @property
    def texts(self) -> list[str]:
        """Of each picture of a point, in plain words."""
        return [prompt.fill(self.super_category) for prompt in self.prompts for _ in self.seeds]

    def draw(self, point: Point) -> Drawn:
        """All pictures of a point; raises as `Painter.draw` does."""
        word = point.source.concept.placeholder
        jobs = jobs_of([prompt.fill(word) for prompt in self.prompts], self.seeds)
        pictures = self.painter.draw(jobs, [point.source.concept], point.manner, point.label or point.source.label)
        found = measured(self.meter, (crop_square(one, self.side) for one in pictures), self.texts)
        return Drawn(found, pictures[::len(self.seeds)])

    def records(self, drawn: Mapping[Point, Drawn]) -> Iterator[dict[str, Any]]:
        """A line for a CSV file for each picture."""
        asked = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for point, result in drawn.items():
            for (prompt, seed), text, one in zip(asked, self.texts, result.found, strict=True):
                yield {**point.record(), "category": prompt.category, "text": text, "seed": seed,
                       **{f"{kind}_similarity": value for kind, value in asdict(one).items()}}


def balance_of(curve: Curve, drawn: Mapping[Point, Drawn]) -> Point | None:
    """The point of a curve that `ldm.inference.auto_bias.balanced` chooses; None of one too short to have a middle."""
    if len(curve.points) < FEWEST_TO_BALANCE:
        return None
    measures = ([[getattr(one, kind) for one in drawn[point].found] for point in curve.points]
                for kind in ("text", "image"))
    tried = [Tried.of_pictures(point.manner.bias, np.array(text), np.array(image), len(drawn[point].pictures))
             for point, text, image in zip(curve.points, *measures, strict=True)]
    return curve.points[tried.index(balanced(tried, curve.points[0].source.concept.bias))]


def _curve(name: str, source: Source, manner: Manner, biases: Sequence[float]) -> Curve:
    settings = [replace(manner, bias=bias) for bias in biases] if source.has_gate else [manner]
    return Curve(name, tuple(Point(source, setting) for setting in settings))


def _name(source: Source, lock: str, among_others: bool) -> str:
    """Of a curve in the sweep over locks."""
    if not source.has_gate:
        return source.label
    keys = "trained keys" if source.lock == "trained" else f"{lock} lock"
    return f"{source.label}, {keys}" if among_others and source.label != keys else keys
