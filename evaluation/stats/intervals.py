"""Means with bootstrap intervals (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979)."""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """The mean of `count` values and, where there are several, the ends of its 95 % interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    count: int = 1

    def text(self, unit: str = "") -> str:
        """Such as "93.5 % (90.0 to 96.5)"."""
        spread = "" if self.low is None else f" ({self.low:.1f} to {self.high:.1f})"
        return f"{self.mean:.1f}{f' {unit}' if unit else ''}{spread}"


def ends(samples: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of a statistic's resamples; NaN, where one leaves nothing to measure, is passed over."""
    low, high = np.nanquantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrapped(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """The mean of independent values with its percentile interval; the same values give the same interval.

    Where all values are equal, so are the ends of the interval: resampling cannot show what did not occur.

    Raises:
        ValueError: there are no values.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not len(given):
        raise ValueError(f"values of shape {given.shape}: a mean needs at least one number")
    if len(given) == 1:
        return Figure(float(given[0]))
    picks = np.random.default_rng(seed).integers(len(given), size=(resamples, len(given)))
    return Figure(float(given.mean()), *ends(given[picks].mean(1)), len(given))


def clustered(values: Sequence[float], clusters: Sequence[Hashable], resamples: int = RESAMPLES, seed: int = 0
              ) -> Figure:
    """The mean of values of which those of one cluster belong together, with an interval by resampling clusters.

    Seeds of one prompt are such clusters: more of them say more about that prompt, but nothing about others.

    Raises:
        ValueError: there are no values, or not one cluster for each.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values, {len(clusters)} clusters: a mean needs one or more, each with its own")
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    rows = [numbers[cluster] for cluster in clusters]
    sums, counts = np.bincount(rows, values), np.bincount(rows)
    mean = float(sums.sum() / counts.sum())
    if len(numbers) == 1:
        return Figure(mean, count=len(values))
    picks = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    return Figure(mean, *ends(sums[picks].sum(1) / counts[picks].sum(1)), len(values))
