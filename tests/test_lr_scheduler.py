"""Learning-rate factors at steps where the formulas have simple values."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.common.errors import UserError
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2
from ldm.models.optimization import optimizer_and_schedule

SINGLE = {"warm_up_steps": 100, "lr_start": 0.01, "lr_max": 1.0, "lr_min": 0.1, "max_decay_steps": 500}
CYCLES = {
    "warm_up_steps": [10, 0],
    "f_start": [0.2, 0.0],
    "f_max": [1.0, 0.5],
    "f_min": [0.1, 0.0],
    "cycle_lengths": [50, 20],
}


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.01),
        (50, 0.505),
        (100, 1.0),
        (200, 0.1 + 0.45 * (1 + math.sqrt(0.5))),
        (300, 0.55),
        (500, 0.1),
        (10**9, 0.1),
    ],
)
def test_warm_up_and_half_a_cosine(step: int, factor: float) -> None:
    schedule = LambdaWarmUpCosineScheduler(**SINGLE)
    assert schedule(step) == schedule.schedule(step) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.2),
        (5, 0.6),
        (10, 1.0),
        (30, 0.55),
        (49, 0.1 + 0.45 * (1 + math.cos(math.pi * 39 / 40))),
        (50, 0.1),  # the last step of the first cycle
        (51, 0.25 * (1 + math.cos(math.pi / 20))),
        (60, 0.25),
        (70, 0.0),
        (1000, 0.0),
    ],
)
def test_cycles_of_cosines(step: int, factor: float) -> None:
    assert LambdaWarmUpCosineScheduler2(**CYCLES)(step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.2), (5, 0.6), (10, 0.1 + 0.9 * 0.8), (25, 0.55), (50, 0.1), (51, 0.5 * 19 / 20),
                         (60, 0.25), (70, 0)]
)
def test_cycles_of_lines(step: int, factor: float) -> None:
    assert LambdaLinearScheduler(**CYCLES)(step) == pytest.approx(factor, abs=1e-12)


def test_one_cycle_is_the_single_schedule() -> None:
    several = LambdaWarmUpCosineScheduler2([100], [0.1], [1.0], [0.01], [500])
    single = LambdaWarmUpCosineScheduler(**SINGLE)
    assert all(several(step) == pytest.approx(single(step)) for step in range(0, 700, 7))


@pytest.mark.parametrize(("schedule", "last"), [
    (LambdaWarmUpCosineScheduler(**SINGLE, verbosity_interval=10), "last_lr"),
    (LambdaLinearScheduler(**CYCLES, verbosity_interval=10), "last_f")])
def test_the_last_factor_is_logged(
    schedule: LambdaWarmUpCosineScheduler | LambdaLinearScheduler, last: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        factors = [schedule(step) for step in (5, 10, 11)]
    assert caplog.messages == [f"current step: 10, recent lr-multiplier: {factors[0]:g}"]
    assert getattr(schedule, last) == factors[-1]


def test_stable_diffusions_schedule_is_flat_after_warm_up() -> None:
    public = LambdaLinearScheduler([10_000], [1.0], [1.0], [1e-6], [10_000_000_000_000])
    assert public(0) == 1e-6 and public(10_000) == public(10**7) == 1.0


@given(st.integers(0, 600), st.floats(0, 1), st.integers(0, 50), st.integers(1, 500))
def test_the_factor_rises_then_falls_within_its_bounds(step: int, low: float, warm_up: int, decay: int) -> None:
    for schedule in (
        LambdaWarmUpCosineScheduler(warm_up, low, 1.0, low, warm_up + decay),
        LambdaLinearScheduler([warm_up], [low], [1.0], [low], [warm_up + decay]),
    ):
        here, following = schedule(step), schedule(step + 1)
        assert low - 1e-9 <= here <= 1 + 1e-9
        if step + 1 < warm_up:
            assert following >= here - 1e-12
        if step >= warm_up:
            assert following <= here + 1e-12


@pytest.mark.parametrize("changes", [{"f_min": [0.1]}, {key: [] for key in CYCLES}])
def test_lists_of_other_lengths_are_refused(changes: dict[str, list[float]]) -> None:
    with pytest.raises(UserError, match="one entry per cycle"):
        LambdaWarmUpCosineScheduler2(**{**CYCLES, **changes})


def learning_rates(settings: dict[str, Any], read: Callable[[torch.optim.Optimizer], float]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    described = optimizer_and_schedule(
        optimizer, {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": settings}
    )
    rates = []
    for _ in range(4):
        rates.append(read(optimizer))
        optimizer.step()
        described["lr_scheduler"]["scheduler"].step()
    assert described["optimizer"] is optimizer and described["lr_scheduler"]["interval"] == "step"
    return rates


def test_the_optimizer_follows_the_schedule() -> None:
    rates = learning_rates({**SINGLE, "warm_up_steps": 2}, lambda optimizer: optimizer.param_groups[0]["lr"])
    factor = LambdaWarmUpCosineScheduler(**{**SINGLE, "warm_up_steps": 2})
    assert rates == pytest.approx([2 * factor(step) for step in range(4)])


def test_without_a_schedule() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert optimizer_and_schedule(optimizer, None) == {"optimizer": optimizer}
