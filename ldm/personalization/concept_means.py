"""Means of the losses and numbers of several concepts in one run."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of_each(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the mean of each concept's part of values (B,): (J,)."""
    return torch.stack([own.mean() for own in values.split(list(sizes))])


def finite_mean(values: Tensor) -> Tensor:
    """Return the mean of values (J,) without those of concepts whose training diverged; NaN if all have."""
    return values.mean() if len(values) < 2 else values.where(values.isfinite(), torch.nan).nanmean()
