"""Trade-off curves of text similarity against image similarity, and paired comparisons of two such curves.

Curves are compared by their Pareto fronts: a point counts only if no other point of the same sweep is higher in both
similarities. Whoever can choose the bias would never choose such a point.

All points of a comparison use the same concepts, prompts and seeds. Each bootstrap resample draws the same concepts and
prompts for all points, so their common variation cancels in differences.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evaluation.stats.crossed import CellValues, percentile_estimate, resampled_means
from evaluation.stats.intervals import CONFIDENCE, RESAMPLES, Estimate

GRID_POINTS = 21  # image similarities at which two curves are compared


@dataclass(frozen=True)
class TradeoffCurve:
    """A curve of P points: means over concepts and prompts, and over R resamples of them.

    Attributes:
        text: (P, 1 + R) text similarity; the first column is the mean over all concepts and prompts.
        image: (P, 1 + R) image similarity, in the same way.
    """

    text: np.ndarray
    image: np.ndarray

    @property
    def transposed(self) -> TradeoffCurve:
        """The same curve with text and image similarity exchanged."""
        return TradeoffCurve(self.image, self.text)

    @property
    def image_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest image similarity on the Pareto front, (1 + R,) each."""
        lowest = np.array([image[0] for image, _ in self._fronts])
        highest = np.array([image[-1] for image, _ in self._fronts])
        return lowest, highest

    def text_at(self, image: np.ndarray) -> np.ndarray:
        """Return the text similarity of the front at given image similarities.

        The front is linear between its points and constant beyond its ends.

        Args:
            image: (G, 1 + R) image similarities.

        Returns:
            (G, 1 + R) text similarities.
        """
        columns = [np.interp(image[:, r], *front) for r, front in enumerate(self._fronts)]
        return np.stack(columns, axis=1)

    @cached_property
    def _fronts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Image and text similarity of the Pareto front of each resample, sorted by image similarity."""
        fronts = []
        for text, image in zip(self.text.T, self.image.T, strict=True):
            # Walk from the highest image similarity down; of equal ones the highest text similarity comes first.
            order = np.lexsort((text, image))[::-1]
            highest_text = np.maximum.accumulate(text[order])
            is_on_front = np.insert(highest_text[1:] > highest_text[:-1], 0, True)
            front = order[is_on_front][::-1]
            fronts.append((image[front], text[front]))
        return fronts


@dataclass(frozen=True)
class CurveGap:
    """The difference in text similarity between two curves, first minus second, at equal image similarity.

    Attributes:
        difference: mean difference over the image similarities that both curves reach. In resamples without a common
            range, the nearest ends of the curves are compared.
        beyond: share of resamples, 0 to 1, in which the whole second curve has more image similarity than the first.
        below: share of resamples, 0 to 1, in which the whole second curve has less image similarity than the first.
    """

    difference: Estimate
    beyond: float = 0.0
    below: float = 0.0

    def swapped(self) -> CurveGap:
        """Return how much more the second curve has than the first."""
        difference = self.difference
        negated = Estimate(-difference.mean, -difference.high, -difference.low, difference.count)
        return CurveGap(negated, self.below, self.beyond)


def build_curve(text: Sequence[CellValues], image: Sequence[CellValues], resamples: int = RESAMPLES, seed: int = 0
                ) -> TradeoffCurve:
    """Build a curve from the values of its points; all curves of a comparison need the same cells."""
    return TradeoffCurve(resampled_means(text, resamples, seed), resampled_means(image, resamples, seed))


def compare_curves(first: TradeoffCurve, second: TradeoffCurve) -> CurveGap:
    """Compare two curves, each of which may be a single point."""
    (first_low, first_high), (second_low, second_high) = first.image_range, second.image_range
    # Compare at equal steps over the common range of image similarities.
    grid = np.linspace(np.maximum(first_low, second_low), np.minimum(first_high, second_high), GRID_POINTS)
    difference = (first.text_at(grid) - second.text_at(grid)).mean(0)
    # The first column is the original sample, not a resample.
    beyond = float((second_low > first_high)[1:].mean())
    below = float((second_high < first_low)[1:].mean())
    return CurveGap(percentile_estimate(difference), beyond, below)


def neighbor_differences(values: np.ndarray, confidence: float = CONFIDENCE) -> list[Estimate]:
    """Return the difference of each point to the previous one, given values (P, 1 + R) of P points."""
    return [percentile_estimate(later - earlier, confidence=confidence)
            for earlier, later in zip(values, values[1:], strict=False)]
