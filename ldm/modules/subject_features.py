"""Features of a subject in a photo, from a CLIP's image tower: what it looks like, whatever stands around it.

The photo is cut around the subject's mask, and everything outside of the mask becomes gray. The mean and the deviation
of a stage of the tower inside the mask keep colors and patterns, which the pooled vector of the tower mostly drops.
The means and deviations follow adaptive instance normalization (Huang and Belongie, ICCV 2017).

Symbols: B cut-outs, stages of widths c_1 ... c_4, pooled vector of width e; F = sum c_i + c_1 + c_2 + e + 64 features.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.copy_paste import box_of
from ldm.modules.color_shares import color_shares

STAGES, DEVIATIONS = 4, 2  # stages that are read, and how many of the first ones have deviations
MARGIN = 1.15  # side of the cut-out, relative to the longer side of the subject
MIN_PIXELS = 8
CLEAR = 0.5  # from here on a pixel of a mask belongs to the subject


def cut_out(image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Return the square around a subject, enlarged or reduced to `size`, and its mask.

    Args:
        image: (3, H, W) in [-1, 1].
        mask: (H, W) in [0, 1].
        size: side of the result.

    Returns:
        (3, size, size) and (1, size, size), or None if the mask holds fewer than 8 pixels.
    """
    inside = mask > CLEAR
    if inside.sum() < MIN_PIXELS:
        return None
    center_x, center_y, longer_side = box_of(inside)
    side = MARGIN * longer_side
    height, width = mask.shape
    # The affine map from the square's coordinates, -1 to 1, to those of the image.
    matrix = torch.tensor([[side / width, 0.0, 2 * center_x / width - 1],
                           [0.0, side / height, 2 * center_y / height - 1]])
    grid = F.affine_grid(matrix[None], [1, 4, size, size], align_corners=False)
    both = torch.cat([image, mask[None]])[None]
    sampled = F.grid_sample(both, grid, align_corners=False, padding_mode="zeros")[0]
    return sampled[:3], sampled[3:].clamp(0, 1)


class SubjectFeatures(nn.Module):
    """Computes the features of cut-outs.

    Args:
        tower: image tower of an `open_clip` CLIP, a residual network or a transformer; it is not trained.
        mean, std: how the tower expects its images in [0, 1] to be normalized.
        size: side of the images that the tower takes.

    Attributes:
        width: F, the number of features.
    """

    def __init__(self, tower: nn.Module, mean: Sequence[float], std: Sequence[float], size: int) -> None:
        super().__init__()
        self.tower = tower.float().eval().requires_grad_(False)
        self.size = size
        self.register_buffer("mean", torch.tensor(tuple(mean))[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std))[:, None, None], persistent=False)
        side = torch.zeros(1, 1, size, size)
        self.width = self(side.expand(-1, 3, -1, -1), side).shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return the features (B, F) of cut-outs.

        Args:
            images: (B, 3, size, size) in [-1, 1].
            masks: (B, 1, size, size) in [0, 1].
        """
        normalized = ((images + 1) / 2 - self.mean) / self.std
        output = self.tower.forward_intermediates(normalized * masks, indices=self._stages(), output_fmt="NCHW")
        features = []
        for index, stage in enumerate(output["image_intermediates"]):
            mean, deviation = masked_statistics(stage, masks)
            features += [mean, deviation] if index < DEVIATIONS else [mean]
        shares = color_shares(images.flatten(2), masks.flatten(1))
        return torch.cat([*features, output["image_features"], shares], 1)

    def _stages(self) -> list[int]:
        """Return the indices of the stages to read: those of a residual network, or four evenly spaced layers."""
        blocks = getattr(getattr(self.tower, "transformer", None), "resblocks", None)
        if blocks is None:
            return list(range(1, STAGES + 1))
        return [round((index + 1) * len(blocks) / STAGES) - 1 for index in range(STAGES)]


def masked_statistics(stage: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation (B, C) of a stage (B, C, h, w) inside of masks (B, 1, H, W)."""
    weights = F.interpolate(masks, size=stage.shape[-2:], mode="area")
    total = weights.sum((2, 3)).clamp(min=1e-3)
    mean = (stage * weights).sum((2, 3)) / total
    variance = ((stage - mean[..., None, None]) ** 2 * weights).sum((2, 3)) / total
    return mean, variance.sqrt()
