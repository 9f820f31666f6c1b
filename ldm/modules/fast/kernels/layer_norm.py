"""Layer norms of short rows, forward and backward in one pass each, with the sum that blocks put before them.

Shapes: M rows of C numbers, (M, C). A program has as many rows as make up NUMBERS.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096


@triton.jit
def _tile(rows, channels, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of this program's rows: where their numbers are, which of them exist, and the rows and columns."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    return place, (row < rows)[:, None] & (column < channels)[None, :], row, column


@triton.jit
def _forward(x, added, total, y, mean, deviation, weight, bias, rows, channels, epsilon, ADDED: tl.constexpr,
             ROWS: tl.constexpr, WIDTH: tl.constexpr):
    place, there, row, column = _tile(rows, channels, ROWS, WIDTH)
    numbers = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if ADDED:
        numbers += tl.load(added + place, mask=there, other=0.0).to(tl.float32)
        kept = numbers.to(total.dtype.element_ty)
        tl.store(total + place, kept, mask=there)
        numbers = kept.to(tl.float32)  # as the backward pass will read them
    centre = tl.sum(numbers, 1) / channels
    apart = tl.where(there, numbers - centre[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / channels + epsilon)
    slope = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    normal = apart * scale[:, None] * slope[None, :] + shift[None, :]
    tl.store(y + place, normal.to(y.dtype.element_ty), mask=there)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(deviation + row, scale, mask=row < rows)


@triton.jit
def _backward(total, gradient, of_total, result, mean, deviation, weight, rows, channels, ROWS: tl.constexpr,
              WIDTH: tl.constexpr):
    place, there, row, column = _tile(rows, channels, ROWS, WIDTH)
    centre = tl.load(mean + row, mask=row < rows, other=0.0)
    scale = tl.load(deviation + row, mask=row < rows, other=0.0)
    numbers = tl.load(total + place, mask=there, other=0.0).to(tl.float32)
    normal = tl.where(there, (numbers - centre[:, None]) * scale[:, None], 0.0)
    slope = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    found = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32) * slope[None, :]
    plain, along = tl.sum(found, 1) / channels, tl.sum(found * normal, 1) / channels
    found = scale[:, None] * (found - plain[:, None] - normal * along[:, None])
    found += tl.load(of_total + place, mask=there, other=0.0).to(tl.float32)
    tl.store(result + place, found.to(result.dtype.element_ty), mask=there)


class SumLayerNorm(torch.autograd.Function):
    """x + added, or x where that is None, and the layer norm of that, twice (..., C).

    Both are to be used: the gradient of the sum is added in the pass that makes that of the norm. Gradients are for x
    and added alone.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
                ) -> tuple[Tensor, Tensor]:
        x, adds = x.contiguous(), added is not None
        added = added.contiguous() if adds else x
        total, y = torch.empty_like(x) if adds else x, torch.empty_like(x)
        channels, rows = x.shape[-1], x.numel() // x.shape[-1]
        width = triton.next_power_of_2(channels)
        shape = (max(1, NUMBERS // width), width)
        mean, deviation = x.new_empty((2, rows), dtype=torch.float32)
        _forward[(triton.cdiv(rows, shape[0]),)](x, added, total, y, mean, deviation, weight, bias, rows, channels,
                                                 epsilon, adds, *shape)
        context.save_for_backward(total, mean, deviation, weight)
        context.shape, context.adds = shape, adds
        return total if adds else x.view_as(x), y

    @staticmethod
    def backward(context: Any, of_total: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, deviation, weight = context.saved_tensors
        channels, rows = total.shape[-1], mean.numel()
        result = torch.empty_like(total)
        _backward[(triton.cdiv(rows, context.shape[0]),)](
            total, gradient.contiguous(), of_total.contiguous(), result, mean, deviation, weight, rows, channels,
            *context.shape)
        return result, result if context.adds else None, None, None, None
