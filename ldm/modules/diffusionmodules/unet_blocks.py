"""The blocks of the U-Net: residual blocks, attention and resampling (Dhariwal & Nichol 2021, arXiv:2105.05233).

Shapes: B batch size, C channels, L positions of a feature map, E width of the timestep embedding.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.util import default


class TimestepBlock(nn.Module):
    """A layer that reads the timestep embedding; `TimestepEmbedSequential` passes it to subclasses."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the layer to x (B, C, ...) under an embedding (B, E)."""
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence of layers, which passes the timestep embedding and the context to the layers that read them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | PromptContext | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Timestep(nn.Module):
    """`timestep_embedding` as a layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.dim)


class Upsample(nn.Module):
    """Double height and width by repetition, then apply a convolution if `use_conv`. With dims=3 the depth stays."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, default(out_channels, channels)
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        scale = [1.0, 2.0, 2.0] if self.dims == 3 else [2.0] * self.dims
        x = F.interpolate(x, scale_factor=scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution if `use_conv`, or by averaging. With dims=3 depth stays."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, default(out_channels, channels)
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block of two convolutions, with the timestep embedding in between.

    Args:
        channels: channels of the input.
        emb_channels: E.
        dropout: dropout rate in front of the second convolution.
        out_channels: channels of the output; None: the same.
        use_conv: whether the skip connection changes channels by a 3x3 convolution instead of a 1x1 one.
        use_scale_shift_norm: whether the embedding scales and shifts the second norm instead of being added.
        dims: number of spatial dimensions, 1, 2 or 3.
        use_checkpoint: whether to recompute activations in the backward pass.
        up, down: whether to double or halve the resolution before the first convolution.
    """

    def __init__(
        self, channels: int, emb_channels: int, dropout: float, out_channels: int | None = None,
        use_conv: bool = False, use_scale_shift_norm: bool = False, dims: int = 2, use_checkpoint: bool = False,
        up: bool = False, down: bool = False,
    ) -> None:
        super().__init__()
        width = default(out_channels, channels)
        self.channels, self.out_channels = channels, width
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, width, 3, padding=1)
        )
        self.updown = up or down
        self.h_upd, self.x_upd = (_resampling(channels, dims, up, down) for _ in range(2))
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, 2 * width if use_scale_shift_norm else width))
        self.out_layers = nn.Sequential(
            normalization(width), nn.SiLU(), nn.Dropout(dropout),
            zero_module(conv_nd(dims, width, width, 3, padding=1)),
        )
        kernel = 3 if use_conv else 1
        self.skip_connection = (
            nn.Identity() if width == channels else conv_nd(dims, channels, width, kernel, padding=kernel // 2)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Compute (B, out_channels, H', W') from x (B, channels, H, W) and emb (B, E)."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self._apply_in_layers(x)
        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.view(*emb_out.shape, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(self.x_upd(x)) + h

    def _apply_in_layers(self, x: Tensor) -> Tensor:
        if not self.updown:
            return self.in_layers(x)
        return self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))


def _resampling(channels: int, dims: int, up: bool, down: bool) -> nn.Module:
    """Return the layer that changes the resolution of a `ResBlock` in one of its branches."""
    if up:
        return Upsample(channels, False, dims)
    return Downsample(channels, False, dims) if down else nn.Identity()


class QKVAttention(nn.Module):
    """Attention of stacked queries, keys and values; maps (B, 3*C, L) to (B, C, L).

    The channels are the queries of all heads, then the keys, then the values (`use_new_attention_order`).
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        query, key, value = (part.transpose(-1, -2) for part in self._split(qkv))
        return F.scaled_dot_product_attention(query, key, value).transpose(-1, -2).flatten(1, 2)

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (B, n_heads, C / n_heads, L) each."""
        return qkv.unflatten(1, (3, self.n_heads, -1)).unbind(1)


class QKVAttentionLegacy(QKVAttention):
    """The older order of the channels: queries, keys and values of the first head, then those of the second."""

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(1, (self.n_heads, 3, -1)).unbind(2)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map of any number of dimensions, with a residual.

    Args:
        channels: C.
        num_heads: number of heads, if `num_head_channels` is -1.
        num_head_channels: channels per head.
        use_checkpoint: whether to recompute activations in the backward pass.
        use_new_attention_order: see `QKVAttention`.

    Raises:
        UserError: if the channels do not divide into heads.
    """

    def __init__(
        self, channels: int, num_heads: int = 1, num_head_channels: int = -1, use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if channels % heads or (num_head_channels != -1 and channels % num_head_channels):
            raise UserError(f"{channels} channels do not divide into attention heads; "
                            f"change num_heads ({num_heads}) or num_head_channels ({num_head_channels})")
        self.channels = channels
        self.num_heads = heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, ...) to a tensor of the same shape."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.qkv(self.norm(x).flatten(2)))
        return x + self.proj_out(attended).view(x.shape)


class AttentionPool2d(nn.Module):
    """Pool a feature map (B, embed_dim, H, W) to (B, output_dim) by attention of its mean to its positions.

    Args:
        spacial_dim: H and W.
        embed_dim: channels of the map.
        num_heads_channels: channels per head.
        output_dim: channels of the result; None: `embed_dim`.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
                 ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2)
        positions = torch.cat([positions.mean(-1, keepdim=True), positions], dim=-1)
        positions = positions + self.positional_embedding.to(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(positions)))[..., 0]
