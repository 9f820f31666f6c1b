"""Attention over image positions and over text, and the transformer that the U-Net puts at each resolution.

Shapes: B batch, C channels, L = H*W image positions, N text tokens, d width of the text encoding.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.util import NORM_GROUPS, checkpoint, zero_module
from ldm.util import default


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of a second one (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with `mult` times the width between them: (..., dim) to (..., dim_out or dim)."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        hidden = int(dim * mult)
        widen = GEGLU(dim, hidden) if glu else nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.net = nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(hidden, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, eq. 1) of x to a context, or to x itself where there is none."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = heads * dim_head
        source = default(context_dim, query_dim)
        self.heads = heads
        self.to_q = nn.Linear(query_dim, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, query_dim), nn.Dropout(dropout))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to: (B, N, d) to twice (B, N, heads * dim_head)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, L, query_dim), context (B, N, context_dim); returns (B, L, query_dim)."""
        key, value = self.keys_values(default(context, x))
        attended = F.scaled_dot_product_attention(*map(self._split_heads, (self.to_q(x), key, value)))
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PerfusionCrossAttention(CrossAttention):
    """Cross-attention whose keys and values a `PromptContext` may edit; a tensor as context is attended to as it is.

    Attributes:
        reads_text: whether it was given a width of a context; without one it attends to the image itself.
        layer_name: what concepts call this layer; `name_text_layers` sets it.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__(query_dim, context_dim, heads, dim_head, dropout)
        self.reads_text = context_dim is not None
        self.layer_name = ""

    def keys_values(self, context: Tensor | PromptContext) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, N, heads * dim_head) each, of an encoded prompt with or without concepts in it."""
        with self.precision(context.device):
            if isinstance(context, PromptContext):
                return context.keys_values(self.layer_name, self.to_k, self.to_v)
            return super().keys_values(context)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """In which keys and values are computed: that of the queries, where W_K and W_V are kept in another."""
        inner, own = self.to_q.weight.dtype, self.to_k.weight.dtype
        return nullcontext() if inner == own else torch.autocast(device.type, inner)


def projected_at_once(context: Tensor | PromptContext | None, layers: Mapping[str, PerfusionCrossAttention]
                      ) -> Tensor | PromptContext | None:
    """A context that has the keys and values of all these layers already, where it is a `PromptContext`."""
    if not layers or not isinstance(context, PromptContext):
        return context
    with next(iter(layers.values())).precision(context.device):
        return context.with_keys_values(layers)


def name_text_layers(unet: nn.Module) -> dict[str, PerfusionCrossAttention]:
    """Tells every layer of `unet` that reads text its own dotted path, and returns those layers by that name."""
    layers = {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, PerfusionCrossAttention) and module.reads_text
    }
    for path, layer in layers.items():
        layer.layer_name = path
    return layers


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward layer, each on a norm and with a residual.

    Args:
        context_dim: width of the text encoding; None makes `attn2` a second self-attention.
        gated_ff: GEGLU instead of GELU in the feed-forward layer.
        checkpoint: recompute activations in the backward pass.
        disable_self_attn: `attn1` too attends to the context.
    """

    def __init__(
        self, dim: int, n_heads: int, d_head: int, dropout: float = 0.0, context_dim: int | None = None,
        gated_ff: bool = True, checkpoint: bool = True, disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        first = PerfusionCrossAttention if disable_self_attn else CrossAttention
        first_source = context_dim if disable_self_attn else None
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        self.attn1 = first(dim, first_source, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = PerfusionCrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | PromptContext | None = None) -> Tensor:
        """x (B, L, dim), context (B, N, context_dim); returns (B, L, dim)."""
        return checkpoint(self._residuals, x, context, flag=self.checkpoint)

    def _residuals(self, x: Tensor, context: Tensor | PromptContext | None) -> Tensor:
        x, normal = self._sum_normalized(self.norm1, x, None)
        x, normal = self._sum_normalized(
            self.norm2, x, self.attn1(normal, context if self.disable_self_attn else None))
        x, normal = self._sum_normalized(
            self.norm3, x, self.attn2(normal, context if self.attn2.reads_text else None))
        return x + self.ff(normal)

    @staticmethod
    def _sum_normalized(norm: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, with what is added to it, and the norm of that."""
        x = x if added is None else x + added
        return x, norm(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to that map.

    The last projection starts at zero, so a new one is the identity. `use_linear` (Stable Diffusion 2) makes the
    projections linear layers instead of 1x1 convolutions: the same map, but weights of another shape.
    """

    def __init__(
        self, in_channels: int, n_heads: int, d_head: int, depth: int = 1, dropout: float = 0.0,
        context_dim: int | None = None, disable_self_attn: bool = False, use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(NORM_GROUPS, in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout, context_dim,
                checkpoint=use_checkpoint, disable_self_attn=disable_self_attn,
            )
            for _ in range(depth)
        )
        self.proj_out = zero_module(
            nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, kernel_size=1)
        )

    def forward(self, x: Tensor, context: Tensor | PromptContext | None = None) -> Tensor:
        """x (B, C, H, W), context (B, N, context_dim); returns (B, C, H, W)."""
        x, normal = self._normalized(x)
        positions = self._project(self.proj_in, _as_sequence(normal))
        for block in self.transformer_blocks:
            positions = block(positions, context)
        return x + _as_map(self._project(self.proj_out, positions), x.shape[-2:])

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the residual, and its norm."""
        return x, self.norm(x)

    @staticmethod
    def _project(layer: nn.Module, positions: Tensor) -> Tensor:
        """A 1x1 convolution is the same linear map at each position, and faster computed as one."""
        return F.linear(positions, layer.weight.flatten(1), layer.bias)


def _as_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H*W, C); no copy where channels lie last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(positions: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H*W, C) to (B, C, H, W) with channels last in memory, without a copy."""
    return positions.unflatten(1, size).permute(0, 3, 1, 2)
