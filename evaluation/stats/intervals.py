"""Means with percentile bootstrap intervals (Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979)."""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: mean of the values.
        low, high: ends of the 95 % interval; None if there are too few values for an interval.
        count: number of values.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    count: int = 1

    def text(self, unit: str = "") -> str:
        """Format the estimate, for example "93.5 % (90.0 to 96.5)"."""
        interval = "" if self.low is None else f" ({self.low:.1f} to {self.high:.1f})"
        return f"{self.mean:.1f}{f' {unit}' if unit else ''}{interval}"


def percentile_interval(resampled: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of a resampled statistic; NaN marks resamples without any value."""
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Estimate the mean of independent values.

    Equal values give an interval of width 0, because resampling cannot produce other values.

    Args:
        values: at least one number; a single number has no interval.
        seed: the same values and seed give the same interval.

    Raises:
        ValueError: if there are no values.
    """
    from scipy.stats import bootstrap  # not at the top: scipy.stats takes 0.8 s to load

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values of shape {array.shape}: a mean needs at least one number")
    if len(array) == 1:
        return Estimate(float(array[0]))
    result = bootstrap((array,), np.mean, n_resamples=resamples, method="percentile", confidence_level=CONFIDENCE,
                       rng=np.random.default_rng(seed))
    low, high = sorted(map(float, result.confidence_interval))  # those of equal values may be rounded the wrong way
    return Estimate(float(array.mean()), low, high, len(array))


def cluster_bootstrap_mean(values: Sequence[float], clusters: Sequence[Hashable], resamples: int = RESAMPLES,
                           seed: int = 0) -> Estimate:
    """Estimate the mean of values that are independent between clusters but not within a cluster.

    Images of one prompt with several seeds are such a cluster: more seeds tell more about this prompt, but nothing
    about other prompts. So whole clusters are resampled.

    Args:
        values: at least one number.
        clusters: the cluster of each value; a single cluster has no interval.

    Raises:
        ValueError: if there are no values, or if `clusters` has another length.
    """
    from scipy.stats import bootstrap

    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values, {len(clusters)} clusters: a mean needs one or more, each with its own")
    # Sum and count of each cluster are all that the mean of a resample depends on.
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    rows = [numbers[cluster] for cluster in clusters]
    sums, counts = np.bincount(rows, values), np.bincount(rows)
    mean = float(sums.sum() / counts.sum())
    if len(numbers) == 1:
        return Estimate(mean, count=len(values))
    result = bootstrap((sums, counts), _ratio_of_sums, n_resamples=resamples, method="percentile", paired=True,
                       confidence_level=CONFIDENCE, rng=np.random.default_rng(seed))
    return Estimate(mean, *map(float, result.confidence_interval), len(values))


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis) / counts.sum(axis)
