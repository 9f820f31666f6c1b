"""Masks of subjects and of the parts to inpaint: read, dilate, feather, and reduce to the latent grid."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, max_pool2d

from ldm.common.errors import UserError
from ldm.data.images import check_aspect_ratio, crop_and_resize, read_mask

THRESHOLD = 127  # of 255 levels: what is brighter counts as white


def read_binary_mask(path: str | Path, photo_size: tuple[int, int], width: int, height: int) -> Tensor:
    """Read a painted mask and crop it as `crop_and_resize` crops its photo, unless it has the final size already.

    Args:
        path: the mask's file.
        photo_size: (width, height) of the photo's file.
        width: width of the result.
        height: height of the result.

    Returns:
        (1, 1, height, width), 1 where the mask is white and 0 elsewhere.

    Raises:
        UserError: as for `read_mask`, the mask does not have the photo's aspect ratio, or it is black wherever the
            photo is used.
    """
    mask = read_mask(path)
    if mask.size != (width, height):
        check_aspect_ratio(path, mask.size, photo_size)
        mask = crop_and_resize(mask, width, height)
    binary = binarize_mask(mask)
    if not binary.any():
        raise UserError(f"{path}: black where the photo is used, so nothing would change; paint the part to generate "
                        "white")
    return binary


def binarize_mask(mask: Image.Image) -> Tensor:
    """Convert an image of mode "L" to a mask (1, 1, H, W), 1 where it is white and 0 elsewhere."""
    return torch.from_numpy(np.array(mask) > THRESHOLD).float()[None, None]


def mask_to_image(mask: Tensor) -> Image.Image:
    """Convert a mask (1, 1, H, W) in [0, 1] to an image of mode "L", with 1 as white."""
    return Image.fromarray(mask[0, 0].mul(255).round().to(torch.uint8).numpy())


def dilate_mask(mask: Tensor, pixels: int) -> Tensor:
    """Return `mask` (B, 1, H, W) with its ones extended by `pixels` to all sides, diagonals included."""
    for _ in range(pixels):
        mask = max_pool2d(mask, kernel_size=3, stride=1, padding=1)
    return mask


def feather_mask(mask: Tensor, border: int) -> Tensor:
    """Return `mask` (B, 1, H, W) with a linear slope around its ones, which is 0 from `border` + 1 pixels on."""
    total = step = mask
    for _ in range(border):
        step = dilate_mask(step, 1)
        total = total + step
    return total / (border + 1)


def unmasked_cells(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Find the cells of a coarser grid in which all weights are 0.

    Args:
        weights: (1, 1, H, W)
        size: (h, w) of the grid.

    Returns:
        (1, 1, h, w), 1 in these cells and 0 in the others.
    """
    return (adaptive_max_pool2d(weights, size) == 0).float()
