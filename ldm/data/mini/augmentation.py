"""Augmentation of images together with their masks, for models that see few sprites of each kind."""
from __future__ import annotations

import kornia.augmentation as kornia
import torch
from torch import Tensor, nn


class MaskedAugmentation(nn.Module):
    """Flips, bends (thin plate splines), rotates, shears and scales images and masks alike, and changes the colors.

    Bending helps most: it turns a sprite into what another artist could have drawn. Any hue may become any other, so
    that only shape and shading tell the kind of a subject.

    Args:
        probability: probability of each augmentation except the horizontal flip, whose probability is 0.5.
    """

    def __init__(self, probability: float = 0.7) -> None:
        super().__init__()
        self.shape = nn.Sequential(
            kornia.RandomHorizontalFlip(0.5), kornia.RandomThinPlateSpline(0.15, p=probability),
            kornia.RandomAffine(15, scale=(0.85, 1.25), shear=(-12, 12, -12, 12), padding_mode="reflection",
                                p=probability))
        self.colors = kornia.ColorJiggle(brightness=0.15, contrast=0.3, saturation=0.4, hue=0.5, p=probability)

    @torch.no_grad()
    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            masks: (B, M, H, W) in [0, 1].

        Returns:
            Both, in the same shapes and ranges.
        """
        augmented = self.shape(torch.cat([(images + 1) / 2, masks], 1)).clamp(0, 1)
        return self.colors(augmented[:, :3]) * 2 - 1, augmented[:, 3:]
