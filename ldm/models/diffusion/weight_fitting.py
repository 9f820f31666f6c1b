"""Bring a checkpoint's weights to the shapes of a model that differs from it in its numbers of channels."""
from __future__ import annotations

import torch
from torch import Tensor

from ldm.common.errors import UserError


def repeat_to_fit(stored: Tensor, own: Tensor) -> Tensor:
    """Return stored weights repeated along their first two axes, the channels, until they have the shape of `own`.

    Where input channels are repeated, weights are divided by the number of their repetitions plus one, as in Stability
    AI's code (`make_it_fit`).

    Raises:
        UserError: if the shapes differ in more than these two axes.
    """
    if stored.shape == own.shape:
        return stored
    if stored.ndim != own.ndim or stored.shape[2:] != own.shape[2:]:
        raise UserError(f"make_it_fit: weights of shape {tuple(stored.shape)} cannot be repeated to {tuple(own.shape)}")
    rows = torch.arange(own.shape[0]) % stored.shape[0]
    if own.ndim == 1:
        return stored[rows]
    columns = torch.arange(own.shape[1]) % stored.shape[1]
    repetitions = 1 + torch.bincount(columns, minlength=stored.shape[1])[columns]
    return stored[rows][:, columns] / repetitions.view(1, -1, *[1] * (own.ndim - 2))
