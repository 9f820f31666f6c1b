"""A sum and its layer norm, in one kernel forward and one backward.

Shapes: M rows of C values, (M, C). A program computes as many rows as fit into BLOCK values.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _tile(rows, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the offsets of this program's values, a mask of those that exist, and the rows and columns."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    offset = row.to(tl.int64)[:, None] * channels + column[None, :]
    return offset, (row < rows)[:, None] & (column < channels)[None, :], row, column


@triton.jit
def _forward(x, added, total, y, mean, rstd, weight, bias, rows, channels, epsilon, HAS_ADDED: tl.constexpr,
             ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the sum of this program's rows and their norms."""
    offset, exists, row, column = _tile(rows, channels, ROWS, WIDTH)
    values = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32)
    if HAS_ADDED:
        values += tl.load(added + offset, mask=exists, other=0.0).to(tl.float32)
        stored = values.to(total.dtype.element_ty)
        tl.store(total + offset, stored, mask=exists)
        values = stored.to(tl.float32)  # as the backward kernel will read them
    center = tl.sum(values, 1) / channels
    deviations = tl.where(exists, values - center[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(deviations * deviations, 1) / channels + epsilon)
    norm_weight = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    norm_bias = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    normal = deviations * scale[:, None] * norm_weight[None, :] + norm_bias[None, :]
    tl.store(y + offset, normal.to(y.dtype.element_ty), mask=exists)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def _backward(total, grad_y, grad_total, result, mean, rstd, weight, rows, channels, ROWS: tl.constexpr,
              WIDTH: tl.constexpr):
    """Compute the gradient of this program's rows: through the norm, plus `grad_total`."""
    offset, exists, row, column = _tile(rows, channels, ROWS, WIDTH)
    center = tl.load(mean + row, mask=row < rows, other=0.0)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)
    values = tl.load(total + offset, mask=exists, other=0.0).to(tl.float32)
    normal = tl.where(exists, (values - center[:, None]) * scale[:, None], 0.0)
    norm_weight = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + offset, mask=exists, other=0.0).to(tl.float32) * norm_weight[None, :]
    grad_mean, product_mean = tl.sum(grad, 1) / channels, tl.sum(grad * normal, 1) / channels
    grad = scale[:, None] * (grad - grad_mean[:, None] - normal * product_mean[:, None])
    grad += tl.load(grad_total + offset, mask=exists, other=0.0).to(tl.float32)
    tl.store(result + offset, grad.to(result.dtype.element_ty), mask=exists)


class SumLayerNorm(torch.autograd.Function):
    """Compute the sum x + added (or x if `added` is None) and its layer norm, both (..., C).

    Use both results: the backward kernel adds the gradient of the sum to that of the norm. Gradients reach x and
    `added` only.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
                ) -> tuple[Tensor, Tensor]:
        x, has_added = x.contiguous(), added is not None
        added = added.contiguous() if has_added else x
        total, y = torch.empty_like(x) if has_added else x, torch.empty_like(x)
        channels, rows = x.shape[-1], x.numel() // x.shape[-1]
        width = triton.next_power_of_2(channels)
        shape = (max(1, BLOCK // width), width)
        mean, rstd = x.new_empty((2, rows), dtype=torch.float32)
        _forward[(triton.cdiv(rows, shape[0]),)](x, added, total, y, mean, rstd, weight, bias, rows, channels,
                                                 epsilon, has_added, *shape)
        context.save_for_backward(total, mean, rstd, weight)
        context.shape, context.has_added = shape, has_added
        return total if has_added else x.view_as(x), y

    @staticmethod
    def backward(context: Any, grad_total: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, rstd, weight = context.saved_tensors
        channels, rows = total.shape[-1], mean.numel()
        result = torch.empty_like(total)
        _backward[(triton.cdiv(rows, context.shape[0]),)](
            total, grad_y.contiguous(), grad_total.contiguous(), result, mean, rstd, weight, rows, channels,
            *context.shape)
        return result, result if context.has_added else None, None, None, None
