"""Random variations of pictures together with their masks, for models that see few drawings of each kind of thing."""
from __future__ import annotations

import kornia.augmentation as kornia
import torch
from torch import Tensor, nn


class Variations(nn.Module):
    """Mirrors, bends (Duchon's thin plate splines), turns, shears and scales pictures, and changes their colours.

    Bending counts most: it makes of one drawing what others could have drawn. Any hue may become any other, so that
    only shape and shading tell what a thing is.

    Args:
        share: how often each of them is applied, apart from mirroring, which is always as likely as not.
    """

    def __init__(self, share: float = 0.7) -> None:
        super().__init__()
        self.shape = nn.Sequential(
            kornia.RandomHorizontalFlip(0.5), kornia.RandomThinPlateSpline(0.15, p=share),
            kornia.RandomAffine(15, scale=(0.85, 1.25), shear=(-12, 12, -12, 12), padding_mode="reflection", p=share))
        self.colours = kornia.ColorJiggle(brightness=0.15, contrast=0.3, saturation=0.4, hue=0.5, p=share)

    @torch.no_grad()
    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] and their masks (B, M, H, W) in [0, 1], varied alike."""
        varied = self.shape(torch.cat([(images + 1) / 2, masks], 1)).clamp(0, 1)
        return self.colours(varied[:, :3]) * 2 - 1, varied[:, 3:]
