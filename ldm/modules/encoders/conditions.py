"""Encoders of conditions other than text: class labels, and maps such as segmentations (Rombach et al., CVPR 2022)."""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.encoders.prompts import AbstractEncoder

METHODS = ("nearest", "bilinear", "bicubic", "area")


class ClassEmbedder(nn.Module):
    """Embed class labels as one token each, for cross-attention: (B,) to (B, 1, embed_dim).

    Args:
        embed_dim: width of the token.
        n_classes: number of classes; a model for guidance has one more, the last, which stands for "no class".
        key: name of the labels in a batch.
        ucg_rate: fraction of the labels that are replaced by "no class", to train guidance (Ho and Salimans 2021). As
            in Stability's code it acts in evaluation mode, too; CompVis's code has none, so that 0 is the default.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0) -> None:
        super().__init__()
        self.key, self.n_classes, self.ucg_rate = key, n_classes, ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Tensor | Mapping[str, Tensor], key: str | None = None,
                disable_dropout: bool = False) -> Tensor:
        """Embed labels (B,), or those of a batch under `key`; the result is (B, 1, embed_dim)."""
        labels = batch[key or self.key] if isinstance(batch, Mapping) else batch
        labels = labels.to(self.embedding.weight.device).long()[:, None]
        if self.ucg_rate > 0 and not disable_dropout:
            is_dropped = torch.bernoulli(torch.full_like(labels, self.ucg_rate, dtype=torch.float32)).bool()
            labels = labels.masked_fill(is_dropped, self.n_classes - 1)
        return self.embedding(labels)

    def get_unconditional_conditioning(self, bs: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Return a batch of `bs` labels that stand for "no class", on a device; None: that of the weights."""
        device = self.embedding.weight.device if device is None else device
        return {self.key: torch.full((bs,), float(self.n_classes - 1), device=device)}


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
