"""The vectors that a placeholder stands for while they are being learned."""
from __future__ import annotations

import torch
from torch import Tensor, nn


class TrainableWord(nn.Module):
    """Vectors that are learned and, after them, vectors that stay.

    Args:
        learned: (n, width), where the learned ones start; n may be 0.
        fixed: (m, width), such as those of the super-category's own word pieces; m may be 0.
    """

    def __init__(self, learned: Tensor, fixed: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(learned.detach().float().clone(), requires_grad=len(learned) > 0)
        self.register_buffer("fixed", fixed.detach().float().clone(), persistent=False)
        self.register_buffer("start", self.vectors.detach().clone(), persistent=False)

    def forward(self) -> Tensor:
        """(n + m, width): the rows of the placeholder's tokens."""
        return torch.cat([self.vectors, self.fixed])

    def distance(self) -> Tensor:
        """How far the learned vectors have strayed from their start, in units of its norm; 0 where there are none."""
        return (self.vectors.detach() - self.start).norm() / self.start.norm().clamp(min=1e-12)
