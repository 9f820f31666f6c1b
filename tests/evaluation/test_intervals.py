"""Means and their bootstrap intervals, compared with closed forms."""
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from evaluation.stats.intervals import Estimate, bootstrap_mean, cluster_bootstrap_mean


def test_interval_of_a_share_follows_from_its_standard_error() -> None:
    hits = [100.0] * 150 + [0.0] * 50
    estimate = bootstrap_mean(hits)
    error = 100 * math.sqrt(0.75 * 0.25 / 200)
    assert estimate.mean == 75 and estimate.count == 200
    assert estimate.low == pytest.approx(75 - 1.96 * error, abs=1)
    assert estimate.high == pytest.approx(75 + 1.96 * error, abs=1)


def test_interval_agrees_with_scipy_for_another_seed() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=120)
    ours = bootstrap_mean(values.tolist(), resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_intervals_equal_those_of_published_results() -> None:
    """The results in the documentation were computed by this formula, before scipy did the resampling."""
    values = np.random.default_rng(3).gamma(2.0, size=60)
    clusters = np.repeat(np.arange(20), 3)
    picks = np.random.default_rng(0).integers(60, size=(2000, 60))
    plain = np.nanquantile(values[picks].mean(1), [0.025, 0.975])
    picks = np.random.default_rng(0).integers(20, size=(2000, 20))
    clustered = np.nanquantile(values.reshape(20, 3).mean(1)[picks].mean(1), [0.025, 0.975])
    for estimate, expected in ((bootstrap_mean(values.tolist()), plain),
                               (cluster_bootstrap_mean(values.tolist(), clusters.tolist()), clustered)):
        assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), abs=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
@example([-9.517318580533817e-228] * 2)
def test_mean_lies_inside_its_interval_and_the_interval_inside_the_values(values: list[float]) -> None:
    estimate = bootstrap_mean(values, resamples=200)
    assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9
    assert bootstrap_mean(values, resamples=200) == estimate


def test_one_value_has_no_interval_and_no_value_has_no_mean() -> None:
    assert bootstrap_mean([3.0]) == Estimate(3.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_estimates_are_formatted_with_their_unit() -> None:
    assert Estimate(93.46, 90.0, 96.51, 200).text("%") == "93.5 % (90.0 to 96.5)"
    assert Estimate(7.0).text("s") == "7.0 s"


def test_clusters_are_resampled_as_a_whole() -> None:
    """Ten equal values tell as much as one; clusters of different sizes count by their size."""
    ones = np.random.default_rng(5).normal(20, 3, 40)
    alone = cluster_bootstrap_mean(ones.tolist(), range(40))
    tenfold = cluster_bootstrap_mean(np.repeat(ones, 10).tolist(), np.repeat(np.arange(40), 10).tolist())
    assert (tenfold.mean, tenfold.low, tenfold.high) == pytest.approx((alone.mean, alone.low, alone.high))
    single = bootstrap_mean(ones.tolist())
    assert (alone.low, alone.high) == pytest.approx((single.low, single.high)) and tenfold.count == 400
    assert bootstrap_mean(np.repeat(ones, 10).tolist()).high < tenfold.high
    uneven = cluster_bootstrap_mean([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert (uneven.mean, uneven.low, uneven.high) == (2.0, 1.0, 5.0)


def test_one_cluster_has_no_interval_and_no_value_has_no_mean() -> None:
    assert cluster_bootstrap_mean([1.0, 3.0], ["a", "a"]) == Estimate(2.0, count=2)
    for values, clusters in (([], []), ([1.0], ["a", "b"])):
        with pytest.raises(ValueError, match="a mean needs"):
            cluster_bootstrap_mean(values, clusters)
