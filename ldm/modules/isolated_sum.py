"""The sum over concepts in training, where one concept that diverges must not spoil the others of its run."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class IsolatedSum(torch.autograd.Function):
    """sum_j g_j o*_j, in which numbers of one concept that are not finite do not reach the others.

    A gate of 0 keeps a concept out of a prompt, but 0 times NaN is NaN: in the sum, and in the gradients of all o*.
    For finite numbers, values and gradients are those of `gates @ target_outputs`.
    """

    @staticmethod
    def forward(context: Any, gates: Tensor, target_outputs: Tensor) -> Tensor:
        """Gates (B, N, J), o* (J, p) -> (B, N, p)."""
        finite_outputs = _finite(target_outputs)
        context.save_for_backward(gates, finite_outputs)
        return gates @ finite_outputs

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gates, finite_outputs = context.saved_tensors
        of_gates = gradient @ finite_outputs.mT if context.needs_input_grad[0] else None
        if not context.needs_input_grad[1]:
            return of_gates, None
        of_outputs = gates.flatten(0, -2).mT @ _finite(gradient).flatten(0, -2)
        # A concept whose own tokens have a gradient that is not finite gets NaN, so that nobody takes it for a step.
        overflowed = ~gradient.isfinite().all(-1, keepdim=True) & (gates != 0)
        concepts = overflowed.flatten(0, -2).any(0)
        return of_gates, of_outputs.masked_fill(concepts[:, None], torch.nan)


def _finite(values: Tensor) -> Tensor:
    """Return the values with 0 in place of numbers that are not finite."""
    return values.nan_to_num(0.0, 0.0, 0.0)
