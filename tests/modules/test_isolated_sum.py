"""The sum over concepts in training: an ordinary product, but for numbers that are not finite."""
from __future__ import annotations

import pytest
import torch

from ldm.modules.isolated_sum import IsolatedSum


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Gates (3, 4, 2) of two concepts, each acting on its own prompts, and their outputs (2, 5)."""
    gates = torch.rand(3, 4, 2, dtype=torch.float64)
    gates[0, :, 1] = gates[1:, :, 0] = 0
    return gates.requires_grad_(), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)


def test_finite_numbers_give_the_product_and_its_gradients() -> None:
    gates, outputs = inputs()
    torch.testing.assert_close(IsolatedSum.apply(gates, outputs), gates @ outputs, rtol=0, atol=0)
    assert torch.autograd.gradcheck(IsolatedSum.apply, (gates, outputs))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_outputs_that_are_not_finite_reach_no_other_concept(bad: float) -> None:
    gates, outputs = inputs()
    expected, expected_gradient = (gates @ outputs)[1:].detach(), None
    (gates @ outputs)[1:].sum().backward()
    expected_gradient = outputs.grad[1].clone()
    outputs.grad = None
    with torch.no_grad():
        outputs[0, 2] = bad
    total = IsolatedSum.apply(gates, outputs)
    assert torch.equal(total[1:], expected)
    total.sum().backward()
    torch.testing.assert_close(outputs.grad[1], expected_gradient)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_marks_its_own_concept_only(bad: float) -> None:
    gates, outputs = inputs()
    (gates @ outputs)[1:].sum().backward()
    expected = outputs.grad[1].clone()
    outputs.grad = None
    gradient = torch.ones(3, 4, 5, dtype=torch.float64)
    gradient[0, 1, 3] = bad
    IsolatedSum.apply(gates, outputs).backward(gradient)
    assert outputs.grad[0].isnan().all()
    torch.testing.assert_close(outputs.grad[1], expected)
