"""The bootstrap over concepts and prompts against closed forms, and by simulations of which the truth is known."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.stats.crossed import Cell, figure_of, figures, means, paired, weights
from evaluation.stats.intervals import Figure, clustered

CONCEPTS, PROMPTS = 8, 12


def grid(values: np.ndarray) -> dict[Cell, list[float]]:
    """A value, or several, for each of (concepts, prompts)."""
    return {Cell((f"concept {c}",), f"prompt {p}"): np.atleast_1d(values[c, p]).tolist()
            for c, p in itertools.product(*map(range, values.shape[:2]))}


def ring(count: int) -> list[Cell]:
    """Pairs of neighbours, each at two places."""
    return [Cell((f"concept {c}", f"concept {(c + 1) % count}"), place) for c in range(count) for place in "ab"]


def test_a_cell_counts_as_its_concept_times_its_prompt() -> None:
    cells = list(grid(np.zeros((3, 4))))
    drawn = weights(cells, 50)
    assert drawn.shape == (51, 12) and (drawn[0] == 1).all() and (drawn.sum(1) == 12).all()
    table = drawn.reshape(51, 3, 4)
    assert np.allclose(table, table.sum(2)[:, :, None] * table.sum(1)[:, None] / 12)  # every one an outer product


def test_a_pair_counts_as_the_product_of_its_concepts_and_something_is_always_left() -> None:
    drawn = weights(ring(3), 300)[1:].reshape(300, 3, 2)
    assert (drawn.sum((1, 2)) > 0).all()
    alone = drawn.sum(2)  # of pairs (0, 1), (1, 2), (2, 0): as often as both were drawn, at both places
    counts = [(2, 1, 0), (1, 1, 1)]
    possible = {tuple(2 * m[i] * m[(i + 1) % 3] for i in range(3)) for some in counts
                for m in itertools.permutations(some)}
    assert set(map(tuple, alone.astype(int).tolist())) == possible


def test_rows_share_resamples_whatever_they_lack() -> None:
    values = np.random.default_rng(0).normal(size=(CONCEPTS, PROMPTS))
    whole = grid(values)
    part = {cell: row for cell, row in whole.items() if cell.prompt != "prompt 3"}
    both = means([whole, part])
    assert np.allclose(both[0], means([whole])[0])
    assert both[1, 0] == pytest.approx(np.delete(values, 3, axis=1).mean())
    same = means([whole, grid(values + 2)])
    assert np.allclose(same[1] - same[0], 2)


def test_with_one_prompt_concepts_are_clusters() -> None:
    values = np.random.default_rng(1).normal(20, 3, (40, 1, 5))
    (ours,) = figures([grid(values)])
    theirs = clustered(values.ravel().tolist(), np.repeat(np.arange(40), 5).tolist())
    assert (ours.mean, ours.count) == (pytest.approx(theirs.mean), 200)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.15)


@pytest.mark.parametrize(("of_concepts", "of_prompts", "of_cells"), [(1, 0, 0.2), (0, 1, 0.2), (1, 1, 1), (0, 0, 1)])
def test_intervals_hold_the_truth_where_concepts_and_prompts_differ(of_concepts: float, of_prompts: float,
                                                                    of_cells: float) -> None:
    """Of 100 studies in which nothing is true, few say that something is; intervals over cells would in half of them
    where concepts differ."""
    draw, right, by_cells = np.random.default_rng(2), 0, 0
    for _ in range(100):
        values = (of_concepts * draw.normal(size=(CONCEPTS, 1)) + of_prompts * draw.normal(size=(1, PROMPTS))
                  + of_cells * draw.normal(size=(CONCEPTS, PROMPTS)))
        figure = figure_of(means([grid(values)], 200)[0])
        right += figure.low <= 0 <= figure.high
        plain = clustered(values.ravel().tolist(), range(values.size), 200)
        by_cells += plain.low <= 0 <= plain.high
    assert right >= 86
    assert by_cells < 70 or not of_concepts + of_prompts


@pytest.mark.parametrize("of_pairs", [0.2, 1.0])
def test_intervals_hold_the_truth_where_pairs_share_concepts(of_pairs: float) -> None:
    draw, cells, right = np.random.default_rng(3), ring(10), 0
    for _ in range(100):
        own = dict(zip((f"concept {c}" for c in range(10)), draw.normal(size=10), strict=True))
        made = {cell: [sum(own[name] for name in cell.concepts) + of_pairs * draw.normal()] for cell in cells}
        figure = figure_of(means([made], 200)[0])
        right += figure.low <= 0 <= figure.high
    assert right >= 86


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=6, max_size=6), st.floats(-10, 10))
def test_a_mean_lies_in_its_interval_and_moves_with_its_values(values: list[float], shift: float) -> None:
    table = np.array(values).reshape(2, 3)
    (one,), (moved,) = figures([grid(table)]), figures([grid(table + shift)])
    assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9
    assert (moved.mean, moved.low, moved.high) == pytest.approx((one.mean + shift, one.low + shift, one.high + shift))


def test_intervals_for_comparing_rows_leave_out_what_cells_have_in_common() -> None:
    draw = np.random.default_rng(7)
    common = draw.normal(0, 10, (CONCEPTS, PROMPTS, 1)) + draw.normal(0, 10, (CONCEPTS, 1, 1))
    rows = [level + common + draw.normal(0, 1, (CONCEPTS, PROMPTS, 4)) for level in (20, 22)]
    plain, found = (made([grid(row) for row in rows]) for made in (figures, paired))
    assert [one.mean for one in found] == pytest.approx([one.mean for one in plain])
    assert plain[0].high > plain[1].low and found[0].high < found[1].low
    # the difference's own interval is as wide as two independent intervals of these widths together
    (difference,) = figures([grid(rows[1] - rows[0])])
    together = np.hypot(*(one.high - one.low for one in found))
    assert together == pytest.approx(difference.high - difference.low, rel=0.15)
    (alone,) = paired([grid(rows[0])])
    assert (alone.mean, alone.low, alone.high) == pytest.approx((plain[0].mean, plain[0].low, plain[0].high))


def test_rows_may_lack_values_and_cells() -> None:
    first, second = (Cell((name,), "a") for name in ("cat", "owl"))
    found = paired([{first: [1.0, 3.0], second: [5.0]}, {first: [2.0]}])
    assert [one.mean for one in found] == [3.0, 2.0]
    assert found[1] == Figure(2.0, count=1) and found[0].count == 3
