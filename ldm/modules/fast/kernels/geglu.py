"""GEGLU's product, value * GELU(gate), of both halves of one tensor, forward and backward in one pass each.

Shapes: M positions of twice F numbers, (M, 2F) to (M, F); Shazeer 2020 (arXiv:2002.05202), Eq. 6.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
ROOT_HALF, DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)  # 1/sqrt(2), 1/sqrt(2 pi)


@triton.jit
def _halves(both, width, COLUMNS: tl.constexpr):
    """Value and gate of this program's numbers, where they are, and which exist."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    place = tl.program_id(0).to(tl.int64) * 2 * width + column
    value = tl.load(both + place, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(both + place + width, mask=there, other=0.0).to(tl.float32)
    return value, gate, place, there


@triton.jit
def _forward(both, y, width, COLUMNS: tl.constexpr):
    value, gate, place, there = _halves(both, width, COLUMNS)
    found = value * gate * 0.5 * (1.0 + tl.erf(gate * ROOT_HALF))
    tl.store(y + place - tl.program_id(0).to(tl.int64) * width, found.to(y.dtype.element_ty), mask=there)


@triton.jit
def _backward(both, gradient, result, width, COLUMNS: tl.constexpr):
    value, gate, place, there = _halves(both, width, COLUMNS)
    found = tl.load(gradient + place - tl.program_id(0).to(tl.int64) * width, mask=there, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * ROOT_HALF))
    slope = below + gate * DENSITY * tl.exp(-0.5 * gate * gate)
    tl.store(result + place, (found * gate * below).to(result.dtype.element_ty), mask=there)
    tl.store(result + place + width, (found * value * slope).to(result.dtype.element_ty), mask=there)


class GatedGELU(torch.autograd.Function):
    """value * GELU(gate) of (..., 2F), value first: (..., F)."""

    @staticmethod
    def forward(context: Any, both: Tensor) -> Tensor:
        both = both.contiguous()
        width = both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], width)
        _forward[(y.numel() // width, triton.cdiv(width, COLUMNS))](both, y, width, COLUMNS)
        context.save_for_backward(both)
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        both, = context.saved_tensors
        width = both.shape[-1] // 2
        result = torch.empty_like(both)
        rows = both.numel() // (2 * width)
        _backward[(rows, triton.cdiv(width, COLUMNS))](both, gradient.contiguous(), result, width, COLUMNS)
        return result
