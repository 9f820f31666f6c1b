"""Attention between the positions of a feature map: that of the first stages, and a linear variant."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Return the group normalization of first stages and spatial transformers, with epsilon 1e-6."""
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


class SpatialSelfAttention(nn.Module):
    """Add single-head self-attention over all positions of a feature map to the map."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(in_channels, in_channels, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class LinearAttention(nn.Module):
    """Self-attention over the positions of a feature map (B, dim, H, W), in time linear in their number.

    Keys are normalized over the positions, and queries not at all.

    Source: Shen et al. 2018 (arXiv:1812.01243), without the softmax of the queries.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        width = heads * dim_head
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * width, kernel_size=1, bias=False)
        self.to_out = nn.Conv2d(width, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        # (B, 3 * heads * c, H, W) -> three of (B, heads, c, H * W)
        query, key, value = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        summary = key.softmax(dim=-1) @ value.transpose(-1, -2)
        attended = summary.transpose(-1, -2) @ query
        return self.to_out(attended.flatten(1, 2).unflatten(-1, x.shape[-2:]))
