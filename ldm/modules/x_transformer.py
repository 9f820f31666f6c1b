"""The transformer encoder of latent diffusion's text-to-image model, with the keys of its checkpoints.

Attention and feed-forward layers alternate, each with a residual (Vaswani et al. 2017) and with a norm in front (Xiong
et al. 2020, arXiv:2002.04745). Names follow the library x-transformers, from which the public code took its encoder.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64
INITIAL_STD = 0.02  # of embeddings


class Attention(nn.Module):
    """Multi-head self-attention with heads of width 64; maps (B, N, dim) to (B, N, dim)."""

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * HEAD_WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(heads * HEAD_WIDTH, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for project in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with four times the width in between; maps (..., dim) to (..., dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.net = nn.Sequential(widen, nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """`depth` pairs of an attention and a feed-forward layer, without a final norm; maps (B, N, dim) to (B, N, dim)."""

    def __init__(self, dim: int, depth: int, heads: int = 8) -> None:
        super().__init__()
        self.dim = dim
        kinds = [kind for _ in range(depth) for kind in (Attention(dim, heads), FeedForward(dim))]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), layer]) for layer in kinds)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class AbsolutePositionalEmbedding(nn.Module):
    """A learned embedding of each of `max_seq_len` positions."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=INITIAL_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return the position embeddings (N, dim) for an x (B, N, dim)."""
        return self.emb(torch.arange(x.shape[1], device=x.device))


class TransformerWrapper(nn.Module):
    """Token and position embeddings, an encoder, a final norm, and a projection to logits."""

    def __init__(self, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0) -> None:
        super().__init__()
        dim = attn_layers.dim
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)
        nn.init.normal_(self.token_emb.weight, std=INITIAL_STD)

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        """Encode tokens whose embeddings are given: (B, N, dim) to (B, N, dim)."""
        return self.norm(self.attn_layers(self.emb_dropout(embedded + self.pos_emb(embedded))))

    def forward(self, x: Tensor, return_embeddings: bool = False,
                embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Encode tokens.

        Args:
            x: tokens (B, N), N at most `max_seq_len`.
            return_embeddings: whether to return encodings instead of logits.
            embedding_manager: replaces the embeddings of placeholders, given tokens and embeddings (Textual Inversion).

        Returns:
            Logits (B, N, num_tokens), or encodings (B, N, dim).
        """
        embedded = self.token_emb(x) if embedding_manager is None else embedding_manager(x, self.token_emb(x))
        encoded = self.encode_embedded(embedded)
        return encoded if return_embeddings else self.to_logits(encoded)
