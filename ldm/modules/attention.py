"""Attention between image positions and to text, and the transformer of the U-Net's levels.

Perfusion enters at one point: `CrossAttention.keys_values` lets a `PromptContext` compute keys and values.

Shapes: B batch, C channels, L = H*W image positions, N text tokens, d width of the text encoding.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.util import checkpoint, zero_module
from ldm.modules.image_attention import LinearAttention, Normalize, SpatialSelfAttention
from ldm.util import default, exists

__all__ = [
    "GEGLU", "BasicTransformerBlock", "CrossAttention", "FeedForward", "LinearAttention",
    "MemoryEfficientCrossAttention", "Normalize", "PerfusionCrossAttention", "SpatialSelfAttention",
    "SpatialTransformer", "default", "exists", "max_neg_value", "name_text_layers", "precompute_keys_values",
    "zero_module",
]


def max_neg_value(t: Tensor) -> float:
    """Return the lowest number of a tensor's dtype."""
    return -torch.finfo(t.dtype).max


class GEGLU(nn.Module):
    """Linear layer gated by the GELU of a second one (Shazeer 2020, arXiv 2002.05202, Eq. 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a hidden width of `mult * dim`: (..., dim) -> (..., dim_out or dim).

    Args:
        glu: use GEGLU instead of GELU.
    """

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
    """Multi-head attention (Vaswani et al. 2017, Eq. 1) of x to a context, or to x if there is no context.

    The context is a tensor, or a `PromptContext`, which computes the keys and values itself and may edit them.

    Attributes:
        heads: number of heads.
        scale: factor of the logits, 1 / sqrt(dim_head).
        reads_text: whether the layer attends to text: it has a `context_dim`. Otherwise it attends to the image.
        layer_name: name of the layer in concepts; `name_text_layers` sets it.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = heads * dim_head
        source = default(context_dim, query_dim)
        self.heads = heads
        self.scale = dim_head**-0.5
        self.reads_text = context_dim is not None
        self.layer_name = ""
        self.to_q = nn.Linear(query_dim, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, query_dim), nn.Dropout(dropout))

    def forward(
        self, x: Tensor, context: Tensor | PromptContext | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from x to the context.

        Args:
            x: (B, L, query_dim).
            context: (B, N, context_dim), or None for self-attention.
            mask: (B, N) of bool, False at tokens that are not attended to; further dimensions are flattened.

        Returns:
            (B, L, query_dim).
        """
        key, value = self.keys_values(default(context, x))
        query, key, value = map(self._split_heads, (self.to_q(x), key, value))
        bias = None if mask is None else _logit_bias(mask, query)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor | PromptContext) -> tuple[Tensor, Tensor]:
        """Return keys and values of a context, with or without concepts, (B, N, heads * dim_head) each."""
        with self.autocast_to_query(context.device):
            if isinstance(context, PromptContext):
                return context.keys_values(self.layer_name, self.to_k, self.to_v)
            return self.to_k(context), self.to_v(context)

    def autocast_to_query(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context manager that computes keys and values in the dtype of the queries.

        It has an effect only if W_K and W_V are stored in another dtype than W_Q.
        """
        query_dtype, key_dtype = self.to_q.weight.dtype, self.to_k.weight.dtype
        return nullcontext() if query_dtype == key_dtype else torch.autocast(device.type, query_dtype)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, L, heads * dim_head) -> (B, heads, L, dim_head)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


PerfusionCrossAttention = CrossAttention  # the name of earlier versions
MemoryEfficientCrossAttention = CrossAttention  # Stability's second class; torch's attention saves memory, too


def _logit_bias(mask: Tensor, query: Tensor) -> Tensor:
    """Return (B, 1, 1, N) in the dtype of the queries: 0 where the mask is True, elsewhere the lowest number."""
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~mask, max_neg_value(bias)).flatten(1)[:, None, None]


def precompute_keys_values(context: Tensor | PromptContext | None, layers: Mapping[str, CrossAttention]
                           ) -> Tensor | PromptContext | None:
    """Return the context with the keys and values of all layers computed, if it is a `PromptContext`."""
    if not layers or not isinstance(context, PromptContext):
        return context
    first = next(iter(layers.values()))
    with first.autocast_to_query(context.device):
        return context.with_keys_values(layers)


def name_text_layers(unet: nn.Module) -> dict[str, CrossAttention]:
    """Find the layers of a U-Net that read text, set their `layer_name` to their dotted path, and return them by it."""
    layers = {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, CrossAttention) and module.reads_text
    }
    for path, layer in layers.items():
        layer.layer_name = path
    return layers


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each with a layer norm before it and a residual.

    Args:
        context_dim: width of the text encoding; None makes `attn2` a second self-attention.
        gated_ff: use GEGLU instead of GELU in the feed-forward layer.
        checkpoint: recompute activations in the backward pass to save memory.
        disable_self_attn: `attn1` attends to the context as well.
    """

    def __init__(
        self, dim: int, n_heads: int, d_head: int, dropout: float = 0.0, context_dim: int | None = None,
        gated_ff: bool = True, checkpoint: bool = True, disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | PromptContext | None = None) -> Tensor:
        """Apply the block: x (B, L, dim), context (B, N, context_dim) -> (B, L, dim)."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | PromptContext | None = None) -> Tensor:
        x, normal = self._sum_normalized(self.norm1, x, None)
        x, normal = self._sum_normalized(self.norm2, x, self.attn1(normal, context if self.disable_self_attn else None))
        x, normal = self._sum_normalized(self.norm3, x, self.attn2(normal, context))
        return x + self.ff(normal)

    @staticmethod
    def _sum_normalized(norm: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum x + added, and its layer norm."""
        x = x if added is None else x + added
        return x, norm(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual.

    The last projection starts at zero, so a new module is the identity.

    Args:
        context_dim: width of the context, or one width for each of the `depth` blocks.
        use_linear: make the projections linear layers, as in Stable Diffusion 2, instead of 1x1 convolutions. They
            compute the same, but their weights have another shape.
        use_checkpoint: recompute activations in the backward pass to save memory.
    """

    def __init__(
        self, in_channels: int, n_heads: int, d_head: int, depth: int = 1, dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None, disable_self_attn: bool = False, use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        context_dims = context_dim if isinstance(context_dim, Sequence) else [context_dim] * depth
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout, width, checkpoint=use_checkpoint, disable_self_attn=disable_self_attn
            )
            for width in context_dims
        )
        self.proj_out = zero_module(
            nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, kernel_size=1)
        )

    def forward(
        self, x: Tensor, context: Tensor | PromptContext | Sequence[Tensor | PromptContext] | None = None
    ) -> Tensor:
        """Apply the blocks: x (B, C, H, W), context (B, N, context_dim) or one for each block -> (B, C, H, W)."""
        contexts = context if isinstance(context, list | tuple) else [context] * len(self.transformer_blocks)
        x, normal = self._normalized(x)
        positions = self._project(self.proj_in, _as_sequence(normal))
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            positions = block(positions, block_context)
        return x + _as_map(self._project(self.proj_out, positions), x.shape[-2:])

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x, for the residual, and its group norm."""
        return x, self.norm(x)

    @staticmethod
    def _project(layer: nn.Module, positions: Tensor) -> Tensor:
        """Apply a linear layer or a 1x1 convolution: the same linear map at each position, and faster as a product."""
        return F.linear(positions, layer.weight.flatten(1), layer.bias)


def _as_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), without a copy if the memory format is channels last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(positions: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) in channels-last memory format, without a copy."""
    return positions.unflatten(1, size).permute(0, 3, 1, 2)
