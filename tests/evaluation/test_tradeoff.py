"""Curves and their gaps against closed forms."""
from __future__ import annotations

import numpy as np
import pytest

from evaluation.stats.crossed import Cell
from evaluation.stats.tradeoff import gap, steps, traced

CONCEPTS, PROMPTS = 6, 10
Cells = dict[Cell, list[float]]


def noisy(means: list[float], seed: int = 0, spread: float = 2.0) -> list[Cells]:
    """What varies from cell to cell is the same for all points, and the means are as given."""
    noise = np.random.default_rng(seed).normal(0, spread, (CONCEPTS, PROMPTS))
    noise -= noise.mean()
    return [{Cell((str(c),), str(p)): [mean + noise[c, p]] for c in range(CONCEPTS) for p in range(PROMPTS)}
            for mean in means]


def test_a_point_below_a_curve_is_compared_at_its_own_image_similarity() -> None:
    curve = traced(noisy([20.0, 24.0]), noisy([80.0, 70.0], seed=2))
    point = traced(noisy([20.0]), noisy([75.0], seed=2))
    found = gap(curve, point)
    assert found.beyond == found.below == 0 and found.figure.mean == pytest.approx(2.0)  # the curve has 22 there
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
    assert (found.beyond, found.below) == (where == "beyond", where == "below")
    assert found.figure.mean == pytest.approx(difference)
    assert gap(traced(noisy([18.0]), noisy([image])), curve).turned() == found


def test_a_point_at_an_end_is_outside_in_some_resamples() -> None:
    curve = traced(noisy([20.0, 24.0]), noisy([80.0, 70.0]))
    at_the_end = gap(curve, traced(noisy([20.0]), noisy([80.0], seed=5)))
    assert 0.3 < at_the_end.beyond < 0.7 and at_the_end.below == 0
    inside = gap(curve, traced(noisy([20.0]), noisy([78.5], seed=5)))
    assert 0 < inside.beyond < at_the_end.beyond / 2


def test_what_another_point_exceeds_in_both_does_not_count() -> None:
    """A sweep that turns back: its lowest bias has less of both than the next one."""
    hooked = traced(noisy([18.0, 20.0, 24.0]), noisy([74.0, 80.0, 70.0]))
    front = traced(noisy([20.0, 24.0]), noisy([80.0, 70.0]))
    for ends, others in zip(hooked.range, front.range, strict=True):
        assert ends == pytest.approx(others)
    for image in (60.0, 72.0, 90.0):
        point = traced(noisy([20.0]), noisy([image]))
        found, wanted = gap(hooked, point), gap(front, point)
        assert (found.beyond, found.below) == (wanted.beyond, wanted.below)
        assert found.figure.mean == pytest.approx(wanted.figure.mean)
    same = traced(noisy([19.0, 23.0]), noisy([75.0, 75.0]))
    assert gap(same, traced(noisy([20.0]), noisy([75.0]))).figure.mean == pytest.approx(3.0)


def test_the_order_of_points_does_not_matter() -> None:
    text, image = noisy([20.0, 24.0, 22.0]), noisy([80.0, 70.0, 76.0])
    point = traced(noisy([20.0]), noisy([75.0]))
    turned = [[points[place] for place in (1, 2, 0)] for points in (text, image)]
    one, other = (gap(traced(*curve), point).figure for curve in (turned, (text, image)))
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_steps_are_between_neighbours() -> None:
    curve = traced(noisy([20.0, 24.0, 23.0]), noisy([80.0, 70.0, 71.0]))
    assert [step.mean for step in steps(curve.text)] == pytest.approx([4.0, -1.0])
    apart = traced([*noisy([20.0]), *noisy([20.0], seed=1)], noisy([80.0, 70.0])).text
    (usual,), (wide,) = steps(apart), steps(apart, confidence=0.99)
    assert wide.low < usual.low < usual.high < wide.high
