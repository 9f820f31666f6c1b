"""Keep the gradients of several concepts in one run apart, so that one cannot affect the others."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler


def clip_norm_of_each(parameters: Sequence[Sequence[nn.Parameter]], max_norm: float) -> None:
    """Scale the gradients of each concept's parameters down to a total norm of at most `max_norm`."""
    for own in parameters:
        torch.nn.utils.clip_grad_norm_(own, max_norm)


class DropOverflows:
    """Wraps the closure of an optimizer's step: compute gradients, then `drop_overflowing` ones.

    Args:
        closure: computes the gradients.
        parameters: the trained parameters of each concept.

    Attributes:
        dropped: whether the last call dropped gradients.
    """

    def __init__(self, closure: Callable[[], Any], parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self.closure, self.parameters, self.dropped = closure, parameters, False

    def __call__(self) -> Any:
        result = self.closure()
        self.dropped = drop_overflowing(self.parameters)
        return result


def drop_overflowing(parameters: Sequence[Sequence[nn.Parameter]]) -> bool:
    """Drop the gradients of the concepts whose gradients are not finite, so that the optimizer skips them alone.

    If the gradients of all concepts are not finite, they stay: the scaler then skips the step as usual.

    Returns:
        Whether gradients were dropped.
    """
    finite = torch.stack([_has_finite_gradients(own) for own in parameters]).tolist()
    if all(finite) or not any(finite):
        return False
    for own, is_finite in zip(parameters, finite, strict=True):
        if not is_finite:
            for parameter in own:
                parameter.grad = None
    return True


def back_off(scaler: GradScaler) -> None:
    """Lower the scale as after a skipped step: the scaler has seen none of the gradients that were dropped."""
    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())


def _has_finite_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return a boolean scalar, on the parameters' device."""
    are_finite = [parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None]
    return torch.stack(are_finite).all() if are_finite else torch.tensor(True)
