"""Curves of text- against image-similarity over a sweep, and how far one lies above another, with paired intervals.

All points of a comparison are drawn from the same concepts, prompts and seeds. So each resample of the bootstrap picks
the same clusters, a concept's prompts, for all of them, and what varies between clusters cancels in differences.
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluation.intervals import CONFIDENCE, RESAMPLES, Figure, clustered

GRID = 21  # places at which two curves are compared


@dataclass(frozen=True)
class Traced:
    """A curve of P points: means over clusters, and over R resamples of them.

    Attributes:
        text, image: (P, 1 + R), the first column the means over all clusters.
    """

    text: np.ndarray
    image: np.ndarray

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest image similarity of its points, (1 + R,) each."""
        return self.image.min(0), self.image.max(0)

    def text_at(self, places: np.ndarray) -> np.ndarray:
        """(G, 1 + R): text similarity at image similarities (G, 1 + R), linear between points, constant beyond."""
        order = np.argsort(self.image, axis=0)
        image, text = (np.take_along_axis(values, order, axis=0) for values in (self.image, self.text))
        return np.stack([np.interp(places[:, r], image[:, r], text[:, r]) for r in range(image.shape[1])], axis=1)


@dataclass(frozen=True)
class Gap:
    """How much more text similarity the first curve has than the second at equal image similarity.

    Attributes:
        figure: the mean difference over the image similarities that both reach.
        second: where the second lies: "inside" the first's range or partly so; or "beyond" it, with more image
            similarity than the first reaches anywhere; or "below" it. Then the ends that are next to each other are
            compared.
    """

    figure: Figure
    second: Literal["inside", "beyond", "below"]


def traced(text: np.ndarray, image: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Traced:
    """A curve from values (P, C) of its points in C clusters; clusters of all curves come in one order."""
    return Traced(resampled(text, resamples, seed), resampled(image, resamples, seed))


def resampled(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(..., 1 + R): means of values (..., C) over all clusters, and over resamples, the same for equal C and seed."""
    count = values.shape[-1]
    picks = np.random.default_rng(seed).integers(count, size=(resamples, count))
    weights = np.stack([np.ones(count), *(np.bincount(row, minlength=count) for row in picks)]) / count
    return values @ weights.T


def figure_of(column: np.ndarray, count: int = 1) -> Figure:
    """A statistic with its percentile interval from (1 + R,) as made of `resampled` means."""
    low, high = np.quantile(column[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(float(column[0]), float(low), float(high), count)


def gap(first: Traced, second: Traced) -> Gap:
    """The first curve above the second; either may be a single point."""
    (low, high), (other_low, other_high) = first.range, second.range
    ends = np.maximum(low, other_low), np.minimum(high, other_high)
    places = np.linspace(*ends, GRID)
    difference = (first.text_at(places) - second.text_at(places)).mean(0)
    where = "beyond" if other_low[0] > high[0] else "below" if other_high[0] < low[0] else "inside"
    return Gap(figure_of(difference), where)


def paired(rows: Sequence[tuple[Sequence[float], Sequence[Hashable]]]) -> list[Figure]:
    """The means of some rows of (values, their clusters), with intervals for comparing the rows with each other.

    What a cluster has in common in all rows, being easy or hard, is taken out of the intervals (Cousineau, "Confidence
    Intervals in Within-Subject Designs", 2005), which are widened by what this hides (Morey, "Confidence Intervals from
    Normalized Data", 2008). A row alone has its plain interval.
    """
    if len(rows) == 1:
        return [clustered(*rows[0])]
    shifts: dict[Hashable, list[float]] = {}
    for values, clusters in rows:
        own: dict[Hashable, list[float]] = {}
        for value, cluster in zip(values, clusters, strict=True):
            own.setdefault(cluster, []).append(value - np.mean(values))
        for cluster, some in own.items():
            shifts.setdefault(cluster, []).append(float(np.mean(some)))
    widening = (len(rows) / (len(rows) - 1)) ** 0.5
    return [_around(float(np.mean(values)), clustered(
        [value - float(np.mean(shifts[cluster])) for value, cluster in zip(values, clusters, strict=True)], clusters),
        widening) for values, clusters in rows]


def _around(mean: float, figure: Figure, widening: float) -> Figure:
    """An interval moved to another mean, and widened."""
    if figure.low is None:
        return Figure(mean, count=figure.count)
    low, high = (mean + widening * (end - figure.mean) for end in (figure.low, figure.high))
    return Figure(mean, low, high, figure.count)


def steps(values: np.ndarray) -> Sequence[Figure]:
    """How much each point has more than the one before it, of (P, 1 + R)."""
    return [figure_of(later - earlier) for earlier, later in zip(values, values[1:], strict=False)]
