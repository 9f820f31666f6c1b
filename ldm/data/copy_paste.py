"""Put the subject of a photo into another image, in the place of what is there.

Copy-paste augmentation: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance
Segmentation" (CVPR 2021, arXiv 2012.07177).

Symbols: an image is (3, H, W) in [-1, 1], a mask (H, W) in [0, 1] and a region (H, W) of booleans, all of one size.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

INSIDE = 0.5  # from here on a pixel of a mask belongs to the subject
GROWN, SMOOTH = 3 / 64, 2 / 64  # of the side: how far a filled region reaches beyond the object, and its blur
CLEAR, SOLID = 0.2, 0.8  # levels of a mask between which the pasted subject becomes opaque


def paste_subject(scene: Tensor, region: Tensor, photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Replace an object in a scene by the subject of a photo, in the same place and as large.

    Args:
        scene: an image.
        region: where the object is; at least one pixel.
        photo: an image.
        mask: of the subject in the photo; at least one pixel is 0.5 or more.

    Returns:
        The image, and the mask of the subject in it.

    Raises:
        ValueError: the region or the mask is empty.
    """
    subject, alpha = _move(photo, mask, box_of(mask >= INSIDE), box_of(region))
    opacity = ((alpha - CLEAR) / (SOLID - CLEAR)).clamp(0, 1)
    return torch.lerp(fill_region(scene, region), subject, opacity), alpha


def box_of(region: Tensor) -> tuple[float, float, float]:
    """Return the center (x, y) of a region and its longer side, in pixels.

    Raises:
        ValueError: the region is empty.
    """
    rows, columns = torch.nonzero(region, as_tuple=True)
    if not len(rows):
        raise ValueError("the region is empty")
    (top, bottom), (left, right) = ((int(axis.min()), int(axis.max()) + 1) for axis in (rows, columns))
    return (left + right) / 2, (top + bottom) / 2, float(max(bottom - top, right - left))


def fill_region(image: Tensor, region: Tensor) -> Tensor:
    """Fill a region of an image, and a border around it, with the nearest colors outside, blurred."""
    side = min(region.shape)
    hole = ndimage.binary_dilation(region.numpy(), iterations=max(1, round(GROWN * side)))
    rows, columns = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    filled = image.numpy()[:, rows, columns]
    blurred = ndimage.gaussian_filter(filled, (0, SMOOTH * side, SMOOTH * side))
    return torch.from_numpy(np.where(hole, blurred, image.numpy()))


def _move(photo: Tensor, mask: Tensor, old: tuple[float, float, float], new: tuple[float, float, float]
          ) -> tuple[Tensor, Tensor]:
    """Move and scale a photo (3, H, W) and its mask so that one box (x, y, side) becomes another."""
    height, width = mask.shape
    (old_x, old_y, old_side), (new_x, new_y, new_side) = old, new
    scale = old_side / new_side
    # The affine map from coordinates of the result, -1 to 1, to those of the photo.
    matrix = torch.tensor([
        [scale, 0.0, (2 * old_x / width - 1) - scale * (2 * new_x / width - 1)],
        [0.0, scale, (2 * old_y / height - 1) - scale * (2 * new_y / height - 1)]])
    # Sampled at twice the size: a subject that becomes smaller is averaged.
    grid = F.affine_grid(matrix[None], [1, 4, 2 * height, 2 * width], align_corners=False)
    sampled = F.grid_sample(torch.cat([photo, mask[None]])[None], grid, mode="bicubic", align_corners=False)
    moved = F.interpolate(sampled, (height, width), mode="area")[0]
    return moved[:3].clamp(-1, 1), moved[3].clamp(0, 1)
