"""Curves and their gaps against closed forms."""
from __future__ import annotations

import numpy as np
import pytest

from evaluation.intervals import clustered
from evaluation.tradeoff import Traced, figure_of, gap, paired, resampled, steps, traced

CLUSTERS = 60


def noisy(means: list[float], seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """(P, C): what varies from cluster to cluster is the same for all points, and the means are as given."""
    noise = np.random.default_rng(seed).normal(0, spread, CLUSTERS)
    return np.array(means)[:, None] + (noise - noise.mean())


def test_means_and_their_resamples_are_those_of_a_bootstrap_over_clusters() -> None:
    values = noisy([20.0], seed=1)
    means = resampled(values[0])
    assert means[0] == pytest.approx(20) and len(means) == 2001
    pictures = np.repeat(values[0], 3) + np.tile([-1.0, 0.0, 1.0], CLUSTERS)
    theirs = clustered(pictures.tolist(), np.repeat(np.arange(CLUSTERS), 3).tolist())
    ours = figure_of(means)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((theirs.mean, theirs.low, theirs.high))


def test_a_point_below_a_curve_is_compared_at_its_own_image_similarity() -> None:
    curve = traced(noisy([20.0, 24.0]), noisy([80.0, 70.0], seed=2))
    point = traced(noisy([20.0]), noisy([75.0], seed=2))
    found = gap(curve, point)
    assert found.second == "inside" and found.figure.mean == pytest.approx(2.0)  # the curve has 22 there
    assert found.figure.high - found.figure.low < 1e-6  # what clusters have in common cancels
    assert gap(point, curve).figure.mean == pytest.approx(-2.0)


def test_curves_are_compared_where_both_are() -> None:
    first = traced(noisy([20.0, 22.0, 26.0]), noisy([80.0, 76.0, 70.0]))
    second = traced(noisy([19.0, 25.0]), noisy([79.0, 67.0]))
    places = np.linspace(70, 79, 21)
    wanted = np.interp(places, [70, 76, 80], [26, 22, 20]) - np.interp(places, [67, 79], [25, 19])
    assert gap(first, second).figure.mean == pytest.approx(wanted.mean())


@pytest.mark.parametrize(("image", "where", "difference"), [(90.0, "beyond", 2.0), (60.0, "below", 6.0)])
def test_a_point_outside_is_compared_with_the_nearest_end(image: float, where: str, difference: float) -> None:
    curve = traced(noisy([20.0, 24.0]), noisy([80.0, 70.0]))
    found = gap(curve, traced(noisy([18.0]), noisy([image])))
    assert found.second == where and found.figure.mean == pytest.approx(difference)


def test_the_order_of_points_does_not_matter() -> None:
    text, image = noisy([20.0, 24.0, 22.0]), noisy([80.0, 70.0, 76.0])
    point = traced(noisy([20.0]), noisy([75.0]))
    order = [1, 2, 0]
    one, other = (gap(traced(*curve), point).figure for curve in ((text[order], image[order]), (text, image)))
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_steps_are_between_neighbours() -> None:
    curve: Traced = traced(noisy([20.0, 24.0, 23.0]), noisy([80.0, 70.0, 71.0]))
    assert [step.mean for step in steps(curve.text)] == pytest.approx([4.0, -1.0])


def test_intervals_for_comparing_rows_leave_out_what_clusters_have_in_common() -> None:
    clusters = np.repeat(np.arange(CLUSTERS), 4)
    common = np.random.default_rng(7).normal(0, 10, CLUSTERS)[clusters]
    noise = np.random.default_rng(8).normal(0, 1, (2, len(clusters)))
    rows = [level + common + own for level, own in zip((20, 22), noise, strict=True)]
    plain = [clustered(row.tolist(), clusters.tolist()) for row in rows]
    found = paired([(row.tolist(), clusters.tolist()) for row in rows])
    assert [one.mean for one in found] == pytest.approx([one.mean for one in plain])
    assert plain[0].high > plain[1].low and found[0].high < found[1].low
    # the difference's own interval is as wide as two independent intervals of these widths together
    difference = clustered((rows[1] - rows[0]).tolist(), clusters.tolist())
    together = np.hypot(*(one.high - one.low for one in found))
    assert together == pytest.approx(difference.high - difference.low, rel=0.1)
    assert paired([(rows[0].tolist(), clusters.tolist())]) == plain[:1]


def test_rows_may_lack_values_and_clusters() -> None:
    found = paired([([1.0, 3.0, 5.0], "aab"), ([2.0], "a")])
    assert [one.mean for one in found] == [3.0, 2.0] and found[1].low is None
