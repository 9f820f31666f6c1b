"""Target outputs that are learned along axes: where these lead, and that nothing leaves them."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.modules.learned_concept import FreeOutputs, OutputsAlongAxes, TargetOutputs, axes_of


def spread(width: int, rank: int, seed: int) -> torch.Tensor:
    rows = torch.randn(rank, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_axes_are_those_of_encodings(width: int, rank: int, seed: int) -> None:
    covariance = spread(width, rank, seed)
    axes = axes_of(covariance).double()
    assert axes.shape[1] <= min(width, rank)
    torch.testing.assert_close(axes @ axes.T, covariance, rtol=1e-3, atol=1e-3 * float(covariance.max()))
    lengths = axes.T @ axes
    torch.testing.assert_close(lengths, lengths.diagonal().diag(), rtol=0, atol=1e-3 * float(lengths.max()))


def test_outputs_start_where_they_are_told_and_move_along_axes_together() -> None:
    torch.manual_seed(0)
    starts, shared = [torch.randn(1, 6), torch.randn(1, 5)], axes_of(spread(4, 2, 0))
    weights = [torch.randn(6, 4), torch.randn(5, 4)]
    learned = OutputsAlongAxes(starts, [weight @ shared for weight in weights])
    torch.testing.assert_close(learned.outputs(), starts)
    optimiser = torch.optim.Adam(learned.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        sum((output - 1).square().sum() for output in learned.outputs()).backward()
        optimiser.step()
    (numbers,) = learned
    assert numbers.shape == (1, 2) and numbers.detach().norm() > 0.1
    for output, start, weight in zip(learned.outputs(), starts, weights, strict=True):
        torch.testing.assert_close(output.detach(), start + numbers.detach() @ shared.T @ weight.T)


def test_the_first_step_is_as_long_as_each_axis() -> None:
    """Adam's first step is the learning rate in each number, so along each axis that times its length."""
    axes = torch.diag(torch.tensor([3.0, 1.0, 0.01]))
    learned = OutputsAlongAxes([torch.zeros(1, 3)], [axes])
    optimiser = torch.optim.Adam(learned.parameters(), lr=0.1)
    (learned.outputs()[0] - 5.0).square().sum().backward()
    optimiser.step()
    torch.testing.assert_close(learned.outputs()[0].detach(), torch.tensor([[0.3, 0.1, 0.001]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("learned", "kept"), [
    (FreeOutputs([torch.zeros(1, 6)]), {"0"}),
    (OutputsAlongAxes([torch.zeros(1, 6)], [torch.ones(6, 2)]), {"0", "start_0"})], ids=["free", "along axes"])
def test_checkpoints_hold_what_is_learned_and_where_it_began(learned: TargetOutputs, kept: set[str]) -> None:
    assert set(learned.state_dict()) == kept
