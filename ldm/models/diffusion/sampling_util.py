"""Limit predicted images, as the LDM family's samplers offer it."""
from __future__ import annotations

from torch import Tensor


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale down the samples of x0 (B, ...) whose root mean square is above `value`, to `value`."""
    norm = x0.square().flatten(1).mean(1).sqrt().clamp(min=value)
    return x0 * (value / norm).view(-1, *[1] * (x0.ndim - 1))
