"""The vectors of a placeholder during training, for methods other than Perfusion."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.concepts.word_norms import relative_norm, restore_norms


class TrainableWord(nn.Module):
    """Trained vectors, followed by fixed ones.

    Args:
        learned: (n, width), where the trained vectors start; n may be 0.
        fixed: (m, width), vectors that stay, such as the word pieces of the super-category; m may be 0.
    """

    def __init__(self, learned: Tensor, fixed: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(learned.detach().float().clone(), requires_grad=len(learned) > 0)
        self.register_buffer("fixed", fixed.detach().float().clone(), persistent=False)
        self.register_buffer("start", self.vectors.detach().clone(), persistent=False)

    def forward(self) -> Tensor:
        """Return the embeddings of the placeholder's tokens, (n + m, width)."""
        return torch.cat([self.vectors, self.fixed])

    def distance(self) -> Tensor:
        """Return the distance of the trained vectors from their start, relative to the start's norm; 0 for none."""
        return (self.vectors.detach() - self.start).norm() / self.start.norm().clamp(min=1e-12)

    def relative_norm(self, widths: Sequence[int]) -> Tensor:
        """Return the largest ratio of a vector's norm to that of its start; `widths` as for `word_norms.part_norms`."""
        return relative_norm(self.vectors.detach(), self.start, widths)

    def restore_norms(self, widths: Sequence[int]) -> None:
        """Scale the trained vectors to the norms of their start; `widths` as for `word_norms.part_norms`."""
        restore_norms(self.vectors, self.start, widths)
