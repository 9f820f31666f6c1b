"""Encoders of conditions other than text: class labels, and maps such as segmentations (Rombach et al., CVPR 2022)."""
from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.encoders.prompts import AbstractEncoder

METHODS = ("nearest", "bilinear", "bicubic", "area")


class ClassEmbedder(nn.Module):
    """Embed class labels as one token each, for cross-attention: (B,) to (B, 1, embed_dim).

    Args:
        embed_dim: width of the token.
        n_classes: number of classes; a model for guidance has one more, which stands for "no class".
        key: name of the labels in a batch.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Tensor | Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Embed labels (B,), or those of a batch under `key`; the result is (B, 1, embed_dim)."""
        labels = batch[key or self.key] if isinstance(batch, Mapping) else batch
        return self.embedding(labels.to(self.embedding.weight.device).long()[:, None])


class SpatialRescaler(AbstractEncoder):
    """Rescale a map to the size of the latents, and map its channels by a 1x1 convolution if `out_channels` is given.

    Args:
        n_stages: number of times to rescale.
        method: interpolation mode, see `torch.nn.functional.interpolate`.
        multiplier: scale factor of each stage.
        in_channels: input channels of the convolution.
        out_channels: output channels of the convolution; None: no convolution.
        bias: whether the convolution has a bias.

    Raises:
        UserError: if the method is unknown, or `n_stages` is negative.
    """

    def __init__(self, n_stages: int = 1, method: str = "bilinear", multiplier: float = 0.5, in_channels: int = 3,
                 out_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        if method not in METHODS:
            raise UserError(f"SpatialRescaler: method {method!r} is unknown; choose one of {', '.join(METHODS)}")
        if n_stages < 0:
            raise UserError(f"SpatialRescaler: n_stages {n_stages} must be 0 or more")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale a map (B, C, H, W)."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)
