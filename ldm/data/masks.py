"""Masks of things, and of what is drawn anew in a picture: read, grown, softened, and brought to a coarser grid."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, max_pool2d

from ldm.common.errors import UserError
from ldm.data.images import cut_to, read_mask, refuse_other_proportions

HALF = 127  # of 255 levels: what is lighter counts as white


def read_part(path: str | Path, photo_size: tuple[int, int], width: int, height: int) -> Tensor:
    """A painted mask as (1, 1, height, width) of ones, where it is white, and zeros.

    It is cut as `cut_to` cuts its photo of `photo_size` (width, height), unless it has the final size already.

    Raises:
        UserError: as `read_mask`, it has not the photo's proportions, or is black wherever the photo is used.
    """
    mask = read_mask(path)
    if mask.size != (width, height):
        refuse_other_proportions(path, mask.size, photo_size)
        mask = cut_to(mask, width, height)
    part = torch.from_numpy(np.array(mask) > HALF).float()[None, None]
    if not part.any():
        raise UserError(f"{path}: black where the photo is used, so nothing would change; paint white what is to be "
                        "drawn anew")
    return part


def as_picture(mask: Tensor) -> Image.Image:
    """(1, 1, H, W) in [0, 1] as a picture in mode "L", 1 white."""
    return Image.fromarray(mask[0, 0].mul(255).round().to(torch.uint8).numpy())


def grown(mask: Tensor, pixels: int) -> Tensor:
    """`mask` (B, 1, H, W) with its ones spread by so many pixels to all sides, corners included."""
    for _ in range(pixels):
        mask = max_pool2d(mask, kernel_size=3, stride=1, padding=1)
    return mask


def softened(mask: Tensor, border: int) -> Tensor:
    """`mask` (B, 1, H, W) with a slope outside of its ones: they stay 1, beyond `border` pixels it is exactly 0."""
    total = step = mask
    for _ in range(border):
        step = grown(step, 1)
        total = total + step
    return total / (border + 1)


def untouched_cells(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Of `weights` (1, 1, H, W), the cells (1, 1, h, w) of a grid of `size`: 1 where all of a cell is 0, else 0."""
    return (adaptive_max_pool2d(weights, size) == 0).float()
