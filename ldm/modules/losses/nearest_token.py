"""The contrastive loss of the tuning-encoder: predictions near to real words, and far from each other.

Source: Arar, Gal, Atzmon et al. (SIGGRAPH Asia 2023, arXiv 2307.06925). The paper predicts a word embedding, and its
tokens are those of CLIP's vocabulary. Here moves of an encoding are predicted, and tokens are moves that words make.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_token_loss(predicted: Tensor, tokens: Tensor, labels: Tensor, nearest: int = 4,
                       temperature: float = 0.1) -> Tensor:
    """Return the mean over b of -log S_b / (S_b + sum over b' of exp(cos(v_b, v_b') / tau)).

    S_b is the sum over the k nearest tokens u of exp(cos(v_b, u) / tau).

    Args:
        predicted: v, (B, d).
        tokens: u, (L, d).
        labels: (B,), what each prediction should be; b' runs over predictions with another label than b's.
        nearest: k.
        temperature: tau.
    """
    directions = F.normalize(predicted, dim=1)
    to_tokens = directions @ F.normalize(tokens, dim=1).T / temperature
    positive = to_tokens.topk(min(nearest, len(tokens)), dim=1).values.logsumexp(1)
    others = (directions @ directions.T / temperature).masked_fill(labels[:, None] == labels, -torch.inf)
    return (torch.cat([positive[:, None], others], 1).logsumexp(1) - positive).mean()
