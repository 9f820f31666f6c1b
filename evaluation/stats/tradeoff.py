"""Curves of text- against image-similarity over a sweep, and how far one lies above another, with paired intervals.

Compared are fronts: of a sweep only the points count that no other point of it exceeds in both similarities. Nobody who
can turn a dial would leave it where another place gives more of both.

All points of a comparison are drawn of the same concepts, from the same prompts and seeds. So each resample of the
bootstrap draws the same concepts and prompts for all of them, and what varies between these cancels in differences.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evaluation.stats.crossed import Cells, figure_of, means
from evaluation.stats.intervals import CONFIDENCE, RESAMPLES, Figure

GRID = 21  # places at which two curves are compared


@dataclass(frozen=True)
class Traced:
    """A curve of P points: means over concepts and prompts, and over R resamples of them.

    Attributes:
        text, image: (P, 1 + R), the first column the means over all.
    """

    text: np.ndarray
    image: np.ndarray

    @property
    def transposed(self) -> Traced:
        """The same with text and image similarity in each other's place."""
        return Traced(self.image, self.text)

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest image similarity of its front, (1 + R,) each."""
        return tuple(np.array([ends[place] for ends, _ in self._fronts]) for place in (0, -1))

    def text_at(self, places: np.ndarray) -> np.ndarray:
        """(G, 1 + R): text similarity of the front at image similarities (G, 1 + R), linear between points, constant
        beyond."""
        found = [np.interp(places[:, r], *front) for r, front in enumerate(self._fronts)]
        return np.stack(found, axis=1)

    @cached_property
    def _fronts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Image and text similarity of the front of each resample, by rising image similarity."""
        fronts = []
        for text, image in zip(self.text.T, self.image.T, strict=True):
            order = np.lexsort((text, image))[::-1]  # of equal images the highest text comes first
            best = np.maximum.accumulate(text[order])
            kept = order[np.insert(best[1:] > best[:-1], 0, True)][::-1]
            fronts.append((image[kept], text[kept]))
        return fronts


@dataclass(frozen=True)
class Gap:
    """How much more text similarity the first curve has than the second at equal image similarity.

    Attributes:
        figure: the mean difference over the image similarities that both reach; in resamples in which there are none,
            the difference of the ends that are next to each other.
        beyond, below: shares of resamples, 0..1, in which there are none as the second has more image similarity than
            the first reaches anywhere, or less than it has anywhere.
    """

    figure: Figure
    beyond: float = 0.0
    below: float = 0.0

    def turned(self) -> Gap:
        """How much more the second has than the first."""
        figure = self.figure
        return Gap(Figure(-figure.mean, -figure.high, -figure.low, figure.count), self.below, self.beyond)


def traced(text: Sequence[Cells], image: Sequence[Cells], resamples: int = RESAMPLES, seed: int = 0) -> Traced:
    """A curve from the values of its points; those of all curves have the same cells."""
    return Traced(means(text, resamples, seed), means(image, resamples, seed))


def gap(first: Traced, second: Traced) -> Gap:
    """The first curve above the second; either may be a single point."""
    (low, high), (other_low, other_high) = first.range, second.range
    ends = np.maximum(low, other_low), np.minimum(high, other_high)
    places = np.linspace(*ends, GRID)
    difference = (first.text_at(places) - second.text_at(places)).mean(0)
    beyond, below = (float(outside[1:].mean()) for outside in (other_low > high, other_high < low))
    return Gap(figure_of(difference), beyond, below)


def steps(values: np.ndarray, confidence: float = CONFIDENCE) -> list[Figure]:
    """How much each point has more than the one before it, of (P, 1 + R)."""
    return [figure_of(later - earlier, confidence=confidence)
            for earlier, later in zip(values, values[1:], strict=False)]
