"""Means and their bootstrap intervals against closed forms."""
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.stats.intervals import Figure, bootstrapped, clustered


def test_the_interval_of_a_share_is_that_of_its_standard_error() -> None:
    hits = [100.0] * 150 + [0.0] * 50
    figure = bootstrapped(hits)
    error = 100 * math.sqrt(0.75 * 0.25 / 200)
    assert figure.mean == 75 and figure.count == 200
    assert figure.low == pytest.approx(75 - 1.96 * error, abs=1)
    assert figure.high == pytest.approx(75 + 1.96 * error, abs=1)


def test_the_interval_agrees_with_scipys() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=120)
    ours = bootstrapped(values.tolist(), resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_mean_lies_in_its_interval_and_the_interval_among_the_values(values: list[float]) -> None:
    figure = bootstrapped(values, resamples=200)
    assert min(values) - 1e-9 <= figure.low <= figure.high <= max(values) + 1e-9
    assert bootstrapped(values, resamples=200) == figure


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert bootstrapped([3.0]) == Figure(3.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrapped([])


def test_figures_as_text() -> None:
    assert Figure(93.46, 90.0, 96.51, 200).text("%") == "93.5 % (90.0 to 96.5)"
    assert Figure(7.0).text("s") == "7.0 s"


def test_clusters_are_resampled_whole() -> None:
    """Ten equal values say as much as one; clusters of different size count by their size."""
    ones = np.random.default_rng(5).normal(20, 3, 40)
    alone = clustered(ones.tolist(), range(40))
    tenfold = clustered(np.repeat(ones, 10).tolist(), np.repeat(np.arange(40), 10).tolist())
    assert (tenfold.mean, tenfold.low, tenfold.high) == pytest.approx((alone.mean, alone.low, alone.high))
    single = bootstrapped(ones.tolist())
    assert (alone.low, alone.high) == pytest.approx((single.low, single.high)) and tenfold.count == 400
    assert bootstrapped(np.repeat(ones, 10).tolist()).high < tenfold.high
    uneven = clustered([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert (uneven.mean, uneven.low, uneven.high) == (2.0, 1.0, 5.0)


def test_one_cluster_has_no_interval_and_none_no_mean() -> None:
    assert clustered([1.0, 3.0], ["a", "a"]) == Figure(2.0, count=2)
    for values, clusters in (([], []), ([1.0], ["a", "b"])):
        with pytest.raises(ValueError, match="a mean needs"):
            clustered(values, clusters)
