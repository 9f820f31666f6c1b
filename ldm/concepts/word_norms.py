"""Norms of word vectors in training: rising norms are the usual fault of learned words.

A word vector for several text encoders is the concatenation of one part per encoder, and each part has its own norm.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def part_norms(vectors: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the norm of each part of word vectors, (n, parts).

    Args:
        vectors: (n, width).
        widths: width of each part, in order; their sum is `width`.
    """
    return torch.stack([part.norm(dim=-1) for part in vectors.split(list(widths), -1)], -1)


def relative_norm(vectors: Tensor, start: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the largest ratio of a part's norm to its norm at the start, a scalar; 1 if there are no vectors.

    Args:
        vectors, start: (n, width), the vectors now and at the start.
        widths: as for `part_norms`.
    """
    if not len(vectors):
        return vectors.new_ones(())
    return (part_norms(vectors, widths) / part_norms(start, widths).clamp(min=1e-12)).max()


@torch.no_grad()
def restore_norms(vectors: Tensor, start: Tensor, widths: Sequence[int]) -> None:
    """Scale each part of the vectors, in place, to the norm that it had at the start. Arguments as `relative_norm`."""
    scales = part_norms(start, widths) / part_norms(vectors, widths).clamp(min=1e-12)
    vectors.mul_(scales.repeat_interleave(torch.tensor(widths, device=scales.device), -1))
