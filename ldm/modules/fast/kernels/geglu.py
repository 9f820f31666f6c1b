"""GEGLU's product, value * GELU(gate), of the two halves of a tensor, in one kernel forward and one backward.

Shapes: M rows of 2F values, (M, 2F) to (M, F). Source: Shazeer 2020 (arXiv:2002.05202), Eq. 6.
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
    """Load this program's values and gates. Return them, their offsets, and a mask of those that exist."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < width
    offset = tl.program_id(0).to(tl.int64) * 2 * width + column
    value = tl.load(both + offset, mask=exists, other=0.0).to(tl.float32)
    gate = tl.load(both + offset + width, mask=exists, other=0.0).to(tl.float32)
    return value, gate, offset, exists


@triton.jit
def _forward(both, y, width, COLUMNS: tl.constexpr):
    value, gate, offset, exists = _halves(both, width, COLUMNS)
    product = value * gate * 0.5 * (1.0 + tl.erf(gate * ROOT_HALF))
    tl.store(y + offset - tl.program_id(0).to(tl.int64) * width, product.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward(both, gradient, result, width, COLUMNS: tl.constexpr):
    value, gate, offset, exists = _halves(both, width, COLUMNS)
    y_offset = offset - tl.program_id(0).to(tl.int64) * width
    grad_y = tl.load(gradient + y_offset, mask=exists, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * ROOT_HALF))  # of the standard normal distribution
    gelu_slope = cdf + gate * DENSITY * tl.exp(-0.5 * gate * gate)
    tl.store(result + offset, (grad_y * gate * cdf).to(result.dtype.element_ty), mask=exists)
    tl.store(result + offset + width, (grad_y * value * gelu_slope).to(result.dtype.element_ty), mask=exists)


class GatedGELU(torch.autograd.Function):
    """Compute value * GELU(gate) of a tensor (..., 2F), the values followed by the gates, to (..., F)."""

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
