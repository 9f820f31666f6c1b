"""Conditions other than text (Rombach et al., CVPR 2022): a class as a token, a map brought to the latents' size."""
from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.encoders.prompts import AbstractEncoder

METHODS = ("nearest", "bilinear", "bicubic", "area")


class ClassEmbedder(nn.Module):
    """Class numbers as one token each, for cross-attention: (B,) to (B, 1, embed_dim).

    Args:
        embed_dim: width.
        n_classes: how many there are; a model for guidance has one more, which stands for none.
        key: where a batch keeps its class numbers, if a whole batch is given.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Tensor | Mapping[str, Tensor], key: str | None = None) -> Tensor:
        labels = batch[key or self.key] if isinstance(batch, Mapping) else batch
        return self.embedding(labels.to(self.embedding.weight.device).long()[:, None])


class SpatialRescaler(AbstractEncoder):
    """A map (B, C, H, W) scaled `n_stages` times by `multiplier`, its channels then mixed if `out_channels` is given.

    Args:
        n_stages: how often.
        method: how positions between pixels are filled, see `torch.nn.functional.interpolate`.
        multiplier: by how much each time.
        in_channels, out_channels: of the 1x1 convolution; None for the second: no convolution.
        bias: whether that adds a constant.

    Raises:
        UserError: another method, or a negative number of stages.
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
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)
