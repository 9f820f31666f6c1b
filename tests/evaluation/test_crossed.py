"""The bootstrap over concepts and prompts, compared with closed forms and with simulations of a known truth."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.stats.crossed import (
    Cell,
    estimate_means,
    estimate_paired_means,
    percentile_estimate,
    resample_weights,
    resampled_means,
)
from evaluation.stats.intervals import Estimate, cluster_bootstrap_mean

CONCEPTS, PROMPTS = 8, 12


def make_cells(values: np.ndarray) -> dict[Cell, list[float]]:
    """Return cells with one or several values, given (concepts, prompts) or (concepts, prompts, seeds) values."""
    return {Cell((f"concept {c}",), f"prompt {p}"): np.atleast_1d(values[c, p]).tolist()
            for c, p in itertools.product(*map(range, values.shape[:2]))}


def make_pairs(count: int) -> list[Cell]:
    """Return each concept paired with the next one, with two prompts each."""
    return [Cell((f"concept {c}", f"concept {(c + 1) % count}"), prompt) for c in range(count) for prompt in "ab"]


def test_weight_of_a_cell_is_the_product_of_its_concept_and_its_prompt() -> None:
    cells = list(make_cells(np.zeros((3, 4))))
    weights = resample_weights(cells, 50)
    assert weights.shape == (51, 12) and (weights[0] == 1).all() and (weights.sum(1) == 12).all()
    table = weights.reshape(51, 3, 4)
    assert np.allclose(table, table.sum(2)[:, :, None] * table.sum(1)[:, None] / 12)  # each is an outer product


def test_weight_of_a_pair_is_the_product_of_its_concepts_and_no_resample_is_empty() -> None:
    weights = resample_weights(make_pairs(3), 300)[1:].reshape(300, 3, 2)
    assert (weights.sum((1, 2)) > 0).all()
    of_pairs = weights.sum(2)  # of pairs (0, 1), (1, 2), (2, 0)
    counts = [(2, 1, 0), (1, 1, 1)]
    possible = {tuple(2 * m[i] * m[(i + 1) % 3] for i in range(3)) for some in counts
                for m in itertools.permutations(some)}
    assert set(map(tuple, of_pairs.astype(int).tolist())) == possible


def test_rows_share_resamples_even_if_some_lack_cells() -> None:
    values = np.random.default_rng(0).normal(size=(CONCEPTS, PROMPTS))
    full = make_cells(values)
    part = {cell: row for cell, row in full.items() if cell.prompt != "prompt 3"}
    both = resampled_means([full, part])
    assert np.allclose(both[0], resampled_means([full])[0])
    assert both[1, 0] == pytest.approx(np.delete(values, 3, axis=1).mean())
    same = resampled_means([full, make_cells(values + 2)])
    assert np.allclose(same[1] - same[0], 2)


def test_with_one_prompt_concepts_are_clusters() -> None:
    values = np.random.default_rng(1).normal(20, 3, (40, 1, 5))
    (ours,) = estimate_means([make_cells(values)])
    theirs = cluster_bootstrap_mean(values.ravel().tolist(), np.repeat(np.arange(40), 5).tolist())
    assert (ours.mean, ours.count) == (pytest.approx(theirs.mean), 200)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("of_concepts", "of_prompts", "of_cells"), [(1, 0, 0.2), (0, 1, 0.2), (1, 1, 1), (0, 0, 1)])
def test_intervals_cover_the_truth_if_concepts_and_prompts_differ(of_concepts: float, of_prompts: float,
                                                                  of_cells: float) -> None:
    """Few of 100 studies without any effect report one; intervals over cells would in half of them if concepts
    differ."""
    rng, covered, covered_by_cells = np.random.default_rng(2), 0, 0
    for _ in range(100):
        values = (of_concepts * rng.normal(size=(CONCEPTS, 1)) + of_prompts * rng.normal(size=(1, PROMPTS))
                  + of_cells * rng.normal(size=(CONCEPTS, PROMPTS)))
        estimate = percentile_estimate(resampled_means([make_cells(values)], 200)[0])
        covered += estimate.low <= 0 <= estimate.high
        plain = cluster_bootstrap_mean(values.ravel().tolist(), range(values.size), 200)
        covered_by_cells += plain.low <= 0 <= plain.high
    assert covered >= 86
    assert covered_by_cells < 70 or not of_concepts + of_prompts


@pytest.mark.parametrize("of_pairs", [0.2, 1.0])
def test_intervals_cover_the_truth_if_pairs_share_concepts(of_pairs: float) -> None:
    rng, cells, covered = np.random.default_rng(3), make_pairs(10), 0
    for _ in range(100):
        effects = dict(zip((f"concept {c}" for c in range(10)), rng.normal(size=10), strict=True))
        row = {cell: [sum(effects[name] for name in cell.concepts) + of_pairs * rng.normal()] for cell in cells}
        estimate = percentile_estimate(resampled_means([row], 200)[0])
        covered += estimate.low <= 0 <= estimate.high
    assert covered >= 86


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=6, max_size=6), st.floats(-10, 10))
def test_mean_lies_inside_its_interval_and_moves_with_its_values(values: list[float], shift: float) -> None:
    table = np.array(values).reshape(2, 3)
    (one,), (moved,) = estimate_means([make_cells(table)]), estimate_means([make_cells(table + shift)])
    assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9
    assert (moved.mean, moved.low, moved.high) == pytest.approx((one.mean + shift, one.low + shift, one.high + shift))


def test_paired_intervals_leave_out_effects_that_all_rows_share() -> None:
    rng = np.random.default_rng(7)
    common = rng.normal(0, 10, (CONCEPTS, PROMPTS, 1)) + rng.normal(0, 10, (CONCEPTS, 1, 1))
    rows = [level + common + rng.normal(0, 1, (CONCEPTS, PROMPTS, 4)) for level in (20, 22)]
    plain, paired = (estimate([make_cells(row) for row in rows]) for estimate in (estimate_means,
                                                                                  estimate_paired_means))
    assert [one.mean for one in paired] == pytest.approx([one.mean for one in plain])
    assert plain[0].high > plain[1].low and paired[0].high < paired[1].low
    # The interval of the difference is as wide as two independent intervals of these widths together.
    (difference,) = estimate_means([make_cells(rows[1] - rows[0])])
    together = np.hypot(*(one.high - one.low for one in paired))
    assert together == pytest.approx(difference.high - difference.low, rel=0.15)
    (alone,) = estimate_paired_means([make_cells(rows[0])])
    assert (alone.mean, alone.low, alone.high) == pytest.approx((plain[0].mean, plain[0].low, plain[0].high))


def test_rows_may_lack_values_and_cells() -> None:
    first, second = (Cell((name,), "a") for name in ("cat", "owl"))
    estimates = estimate_paired_means([{first: [1.0, 3.0], second: [5.0]}, {first: [2.0]}])
    assert [one.mean for one in estimates] == [3.0, 2.0]
    assert estimates[1] == Estimate(2.0, count=1) and estimates[0].count == 3
