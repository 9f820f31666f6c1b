"""The sum at the end of a residual block, x + h + bias, in one kernel."""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values per program


@triton.jit
def _sum(x, h, bias, y, channels, total, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offset < total
    values = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32) + tl.load(h + offset, mask=exists, other=0.0)
    values += tl.load(bias + offset % channels, mask=exists, other=0.0)
    tl.store(y + offset, values.to(y.dtype.element_ty), mask=exists)


class BiasedSum(torch.autograd.Function):
    """Compute x + h + bias for maps x and h (B, C, H, W) and a bias (C,). Gradients reach the maps only."""

    @staticmethod
    def forward(context: Any, x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        x, h = (maps.contiguous(memory_format=torch.channels_last) for maps in (x, h))
        y = torch.empty_like(x)
        _sum[(triton.cdiv(y.numel(), BLOCK),)](x, h, bias, y, y.shape[1], y.numel(), BLOCK)
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None
