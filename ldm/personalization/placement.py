"""Bring large models to the device of a run without taking more memory there than training itself does."""
from __future__ import annotations

import torch
from torch import nn

from ldm.modules.fast.sixteen_bits import MIXED_PRECISIONS, to_sixteen_bits
from ldm.util import count_params

LARGE = 2**30  # weights; Stable Diffusion XL has 2.6 billion, 2.x 0.87 billion


def is_large(unet: nn.Module) -> bool:
    """Return whether a U-Net in 32 bits takes so much memory that it must not be on the device beside other work."""
    return count_params(unet) > LARGE


def store_in_sixteen_bits(unet: nn.Module, precision: str, device: torch.device) -> torch.dtype | None:
    """Convert a large U-Net that is not trained before it takes twice the memory of the device.

    `ldm.training.callbacks.AccelerateFrozenUNet` would do so anyway, when training starts.

    Args:
        unet: on any device.
        precision: Lightning's name for it, of the trainer.
        device: where it will be trained.

    Returns:
        The dtype; None if the U-Net keeps its own.
    """
    dtype = MIXED_PRECISIONS.get(precision) if device.type == "cuda" else None
    if dtype is None or not is_large(unet):
        return None
    to_sixteen_bits(unet, dtype)
    return dtype
