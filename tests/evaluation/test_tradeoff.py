"""Trade-off curves and their comparison, checked against closed forms."""
from __future__ import annotations

import numpy as np
import pytest

from evaluation.stats.crossed import Cell
from evaluation.stats.tradeoff import build_curve, compare_curves, neighbor_differences

CONCEPTS, PROMPTS = 6, 10
Cells = dict[Cell, list[float]]


def make_points(means: list[float], seed: int = 0, spread: float = 2.0) -> list[Cells]:
    """Return points with the given means that share their variation between cells."""
    noise = np.random.default_rng(seed).normal(0, spread, (CONCEPTS, PROMPTS))
    noise -= noise.mean()
    return [{Cell((str(c),), str(p)): [mean + noise[c, p]] for c in range(CONCEPTS) for p in range(PROMPTS)}
            for mean in means]


def test_a_point_below_a_curve_is_compared_at_its_own_image_similarity() -> None:
    curve = build_curve(make_points([20.0, 24.0]), make_points([80.0, 70.0], seed=2))
    point = build_curve(make_points([20.0]), make_points([75.0], seed=2))
    gap = compare_curves(curve, point)
    assert gap.beyond == gap.below == 0 and gap.difference.mean == pytest.approx(2.0)  # the curve has 22 there
    assert gap.difference.high - gap.difference.low < 1e-6  # the common variation of clusters cancels
    assert compare_curves(point, curve).difference.mean == pytest.approx(-2.0)


def test_curves_are_compared_over_their_common_range() -> None:
    first = build_curve(make_points([20.0, 22.0, 26.0]), make_points([80.0, 76.0, 70.0]))
    second = build_curve(make_points([19.0, 25.0]), make_points([79.0, 67.0]))
    grid = np.linspace(70, 79, 21)
    expected = np.interp(grid, [70, 76, 80], [26, 22, 20]) - np.interp(grid, [67, 79], [25, 19])
    assert compare_curves(first, second).difference.mean == pytest.approx(expected.mean())


@pytest.mark.parametrize(("image", "where", "difference"), [(90.0, "beyond", 2.0), (60.0, "below", 6.0)])
def test_a_point_outside_the_range_is_compared_with_the_nearest_end(image: float, where: str, difference: float
                                                                    ) -> None:
    curve = build_curve(make_points([20.0, 24.0]), make_points([80.0, 70.0]))
    point = build_curve(make_points([18.0]), make_points([image]))
    gap = compare_curves(curve, point)
    assert (gap.beyond, gap.below) == (where == "beyond", where == "below")
    assert gap.difference.mean == pytest.approx(difference)
    assert compare_curves(point, curve).swapped() == gap


def test_a_point_at_an_end_is_outside_in_some_resamples() -> None:
    curve = build_curve(make_points([20.0, 24.0]), make_points([80.0, 70.0]))
    at_the_end = compare_curves(curve, build_curve(make_points([20.0]), make_points([80.0], seed=5)))
    assert 0.3 < at_the_end.beyond < 0.7 and at_the_end.below == 0
    inside = compare_curves(curve, build_curve(make_points([20.0]), make_points([78.5], seed=5)))
    assert 0 < inside.beyond < at_the_end.beyond / 2


@pytest.mark.slow
def test_dominated_points_do_not_count() -> None:
    """The lowest bias of this sweep is lower in both similarities than the next one."""
    hooked = build_curve(make_points([18.0, 20.0, 24.0]), make_points([74.0, 80.0, 70.0]))
    front = build_curve(make_points([20.0, 24.0]), make_points([80.0, 70.0]))
    for ends, expected_ends in zip(hooked.image_range, front.image_range, strict=True):
        assert ends == pytest.approx(expected_ends)
    for image in (60.0, 72.0, 90.0):
        point = build_curve(make_points([20.0]), make_points([image]))
        gap, expected = compare_curves(hooked, point), compare_curves(front, point)
        assert (gap.beyond, gap.below) == (expected.beyond, expected.below)
        assert gap.difference.mean == pytest.approx(expected.difference.mean)
    same = build_curve(make_points([19.0, 23.0]), make_points([75.0, 75.0]))
    point = build_curve(make_points([20.0]), make_points([75.0]))
    assert compare_curves(same, point).difference.mean == pytest.approx(3.0)


def test_order_of_points_does_not_matter() -> None:
    text, image = make_points([20.0, 24.0, 22.0]), make_points([80.0, 70.0, 76.0])
    point = build_curve(make_points([20.0]), make_points([75.0]))
    reordered = [[points[index] for index in (1, 2, 0)] for points in (text, image)]
    one, other = (compare_curves(build_curve(*curve), point).difference for curve in (reordered, (text, image)))
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_differences_are_between_neighbors() -> None:
    curve = build_curve(make_points([20.0, 24.0, 23.0]), make_points([80.0, 70.0, 71.0]))
    assert [step.mean for step in neighbor_differences(curve.text)] == pytest.approx([4.0, -1.0])
    separate = build_curve([*make_points([20.0]), *make_points([20.0], seed=1)], make_points([80.0, 70.0])).text
    (usual,), (wide,) = neighbor_differences(separate), neighbor_differences(separate, confidence=0.99)
    assert wide.low < usual.low < usual.high < wide.high
