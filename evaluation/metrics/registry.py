"""The metrics that images of a concept are scored by.

To add one, write a function that takes an `ImageBatch` and returns a value for each image, and add a line to `METRICS`.
The tables, CSV columns and plots of `clip_eval.py` and `pareto.py` read this list.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.metrics.similarity import (
    ImageBatch,
    References,
    image_similarity,
    object_similarity,
    photo_object_similarity,
    photo_similarity,
    text_similarity,
)
from evaluation.stats.intervals import Estimate

Scores = dict[str, float | None]  # the scores of one image: metric's name -> value; None if the metric does not apply


@dataclass(frozen=True)
class Metric:
    """One way to score images.

    Attributes:
        name: short, for CSV columns of means and as the key of `Scores`.
        heading: for tables, axes and, with underscores, CSV columns of single images.
        score: returns a value for each image of a batch; None for an image that it does not apply to.
        score_photos: returns what the photos reach among each other; None if nothing like that exists.
        is_available: returns whether the references allow this metric; otherwise no image has a value.
        missing: says why a single image has no value; `{super_category}` may stand in it.
        unit: follows the values in tables.
    """

    name: str
    heading: str
    score: Callable[[ImageBatch], Sequence[float | None]]
    score_photos: Callable[[References], float | None] = lambda _: None
    is_available: Callable[[References], bool] = lambda _: True
    missing: str = "there is no value"
    unit: str = ""

    @property
    def column(self) -> str:
        """The name of the CSV column with the values of single images."""
        return self.heading.replace(" ", "_")

    def cell(self, estimates: Mapping[str, Estimate]) -> str:
        """Return the table cell of this metric; "-" if it is not among the estimates."""
        return estimates[self.name].text(self.unit) if self.name in estimates else "-"


METRICS = (
    Metric("text", "text similarity", text_similarity),
    Metric("image", "image similarity", image_similarity, photo_similarity),
    Metric("object", "object similarity", object_similarity, photo_object_similarity,
           is_available=lambda references: references.object_embeddings is not None,
           missing="the segmenter finds no {super_category}"),
)
