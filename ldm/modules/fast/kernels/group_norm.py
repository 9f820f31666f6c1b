"""Group norms of channels-last feature maps, optionally with a SiLU, in fused kernels forward and backward.

Torch's group norm works on channels-first maps. On channels-last maps it copies the map twice, forward and backward,
and a SiLU takes one more pass. These kernels take the maps as convolutions return them: they read a map twice in the
forward pass, and twice in the backward pass.

Mean and variance of a group are computed in two stages. First, each chunk (ROWS rows of one channel) computes its mean
and its sum of squared deviations. Then the chunks of a group are combined (Chan, Golub, LeVeque 1979, "Updating
Formulae", Eq. 1.5). So there is no cancellation in maps that are far from 0. All sums are float32.

Shapes: B maps of R positions (rows) and C channels (columns), (B, R, C), in G groups. A program of the kernels on maps
computes a tile of ROWS by COLUMNS. A program of the kernels that combine chunks computes one group of one map, CHUNKS
chunks at a time.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, CHUNKS, LANES = 64, 64, 16, 128


@triton.jit
def _tile(channels, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the offsets of this program's tile, a mask of the values that exist, and the columns."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * rows * channels
    offset = start + row[:, None] * channels + column[None, :]
    return offset, (row < rows)[:, None] & (column < channels)[None, :], column


@triton.jit
def _chunk_offset(chunks, channels, column):
    """Return the offsets of this program's chunks in a tensor (B, chunks, C)."""
    return (tl.program_id(0) * chunks + tl.program_id(1)) * channels + column


@triton.jit
def _load_values(x, added, offset, exists, column, channels, HAS_ADDED: tl.constexpr):
    """Load the values to normalize: a tile of x, plus `added` of each channel."""
    values = tl.load(x + offset, mask=exists, other=0.0).to(tl.float32)
    if HAS_ADDED:
        channel_added = tl.load(added + tl.program_id(0) * channels + column, mask=column < channels, other=0.0)
        values += channel_added.to(tl.float32)[None, :]
    return values


@triton.jit
def _normalize_tile(values, mean, rstd, column, channels, groups):
    """Return the normalized values of a tile, and the reciprocal standard deviation of each column's group."""
    group = tl.program_id(0) * groups + column // (channels // groups)
    scale = tl.load(rstd + group, mask=column < channels, other=0.0)
    center = tl.load(mean + group, mask=column < channels, other=0.0)
    return (values - center[None, :]) * scale[None, :], scale


@triton.jit(do_not_specialize=["chunks"])
def _chunk_moments(x, added, means, squares, channels, rows, chunks, HAS_ADDED: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr):
    """Compute the mean and the sum of squared deviations of each chunk."""
    offset, exists, column = _tile(channels, rows, ROWS, COLUMNS)
    values = _load_values(x, added, offset, exists, column, channels, HAS_ADDED)
    count = tl.minimum(rows - tl.program_id(1) * ROWS, ROWS).to(tl.float32)
    center = tl.sum(tl.where(exists, values, 0.0), 0) / count
    deviations = tl.where(exists, values - center[None, :], 0.0)
    chunk = _chunk_offset(chunks, channels, column)
    tl.store(means + chunk, center, mask=column < channels)
    tl.store(squares + chunk, tl.sum(deviations * deviations, 0), mask=column < channels)


@triton.jit(do_not_specialize=["chunks"])
def _combine_moments(means, squares, mean, rstd, channels, rows, chunks, groups, epsilon, ROWS: tl.constexpr,
                     CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Combine the chunks of a group into its mean and its reciprocal standard deviation."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    size = channels // groups
    lane = tl.arange(0, WIDTH)
    first = image * chunks * channels + group * size
    group_size = rows * size

    # The mean of the group.
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        exists = (chunk < chunks)[:, None] & (lane < size)[None, :]
        count = tl.minimum(rows - chunk * ROWS, ROWS).to(tl.float32)
        total += count[:, None] * tl.load(means + first + chunk[:, None] * channels + lane[None, :], exists, 0.0)
    center = tl.sum(total) / group_size

    # The sum of squared deviations from that mean: within the chunks, and of the chunks' means.
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        exists = (chunk < chunks)[:, None] & (lane < size)[None, :]
        count = tl.minimum(rows - chunk * ROWS, ROWS).to(tl.float32)
        offset = first + chunk[:, None] * channels + lane[None, :]
        deviations = tl.where(exists, tl.load(means + offset, exists, 0.0) - center, 0.0)
        total += tl.load(squares + offset, exists, 0.0) + count[:, None] * deviations * deviations

    tl.store(mean + tl.program_id(0), center)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total) / group_size + epsilon))


@triton.jit
def _forward(x, added, y, mean, rstd, weight, bias, channels, rows, groups, HAS_ADDED: tl.constexpr,
             SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Normalize a tile, and apply weight, bias and SiLU."""
    offset, exists, column = _tile(channels, rows, ROWS, COLUMNS)
    values = _load_values(x, added, offset, exists, column, channels, HAS_ADDED)
    normal, _ = _normalize_tile(values, mean, rstd, column, channels, groups)
    norm_weight = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    norm_bias = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    z = normal * norm_weight[None, :] + norm_bias[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offset, z.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _gradient_of_normal(grad_y, normal, weight, bias, offset, exists, column, channels, SILU: tl.constexpr):
    """Return the gradient of a tile's normalized values."""
    norm_weight = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + offset, mask=exists, other=0.0).to(tl.float32)
    if SILU:
        norm_bias = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
        z = normal * norm_weight[None, :] + norm_bias[None, :]
        gate = tl.sigmoid(z)
        grad = grad * gate * (1.0 + z * (1.0 - gate))
    return grad * norm_weight[None, :]


@triton.jit(do_not_specialize=["chunks"])
def _chunk_gradients(x, added, grad_y, grad_sums, product_sums, mean, rstd, weight, bias, channels, rows, chunks,
                     groups, HAS_ADDED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the gradients of each chunk's normalized values, and their products with those values."""
    offset, exists, column = _tile(channels, rows, ROWS, COLUMNS)
    values = _load_values(x, added, offset, exists, column, channels, HAS_ADDED)
    normal, _ = _normalize_tile(values, mean, rstd, column, channels, groups)
    grad = _gradient_of_normal(grad_y, normal, weight, bias, offset, exists, column, channels, SILU)
    chunk = _chunk_offset(chunks, channels, column)
    tl.store(grad_sums + chunk, tl.sum(grad, 0), mask=column < channels)  # outside of the map, the gradient is 0
    tl.store(product_sums + chunk, tl.sum(grad * normal, 0), mask=column < channels)


@triton.jit(do_not_specialize=["chunks"])
def _combine_gradients(grad_sums, product_sums, grad_mean, product_mean, channels, rows, chunks, groups,
                       CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Combine the chunks of a group into the means of its gradients and of the products."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    size = channels // groups
    lane = tl.arange(0, WIDTH)
    first = image * chunks * channels + group * size
    grad_total, product_total = tl.zeros((CHUNKS, WIDTH), tl.float32), tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        exists = (chunk < chunks)[:, None] & (lane < size)[None, :]
        offset = first + chunk[:, None] * channels + lane[None, :]
        grad_total += tl.load(grad_sums + offset, exists, 0.0)
        product_total += tl.load(product_sums + offset, exists, 0.0)
    tl.store(grad_mean + tl.program_id(0), tl.sum(grad_total) / (rows * size))
    tl.store(product_mean + tl.program_id(0), tl.sum(product_total) / (rows * size))


@triton.jit
def _backward(x, added, grad_y, grad_x, result, mean, rstd, grad_mean, product_mean, weight, bias, channels, rows,
              groups, HAS_GRAD_X: tl.constexpr, HAS_ADDED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):
    """Compute the gradient of a tile of x, plus the gradient that reached x by other ways."""
    offset, exists, column = _tile(channels, rows, ROWS, COLUMNS)
    values = _load_values(x, added, offset, exists, column, channels, HAS_ADDED)
    normal, scale = _normalize_tile(values, mean, rstd, column, channels, groups)
    grad = _gradient_of_normal(grad_y, normal, weight, bias, offset, exists, column, channels, SILU)
    group = tl.program_id(0) * groups + column // (channels // groups)
    group_grad = tl.load(grad_mean + group, mask=column < channels, other=0.0)
    group_product = tl.load(product_mean + group, mask=column < channels, other=0.0)
    grad = scale[None, :] * (grad - group_grad[None, :] - normal * group_product[None, :])
    if HAS_GRAD_X:
        grad += tl.load(grad_x + offset, mask=exists, other=0.0).to(tl.float32)
    tl.store(result + offset, grad.to(result.dtype.element_ty), mask=exists)


class GroupNormSiLU(torch.autograd.Function):
    """Compute the group norm of x, or of x plus a value per channel, optionally followed by SiLU.

    Returns x as well. Whoever needs x besides its norm should use the returned one: the backward kernel then adds both
    gradients. Gradients reach x only.

    Args:
        x: (B, C, H, W)
        added: (B, C), added to the channels before the norm; None: nothing.
        weight, bias: (C,)
        groups: number of groups.
        epsilon: added to the variance.
        silu: whether to apply SiLU to the norm.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int,
                epsilon: float, silu: bool) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        has_added, added = added is not None, weight if added is None else added.contiguous()
        (images, channels), rows = x.shape[:2], x.shape[2] * x.shape[3]
        grid = (images, triton.cdiv(rows, ROWS), triton.cdiv(channels, COLUMNS))
        chunks = grid[1]

        # Mean and reciprocal standard deviation of each group.
        means, squares = x.new_empty((2, images, chunks, channels), dtype=torch.float32)
        mean, rstd = x.new_empty((2, images * groups), dtype=torch.float32)
        _chunk_moments[grid](x, added, means, squares, channels, rows, chunks, has_added, ROWS, COLUMNS)
        _combine_moments[(images * groups,)](means, squares, mean, rstd, channels, rows, chunks, groups, epsilon,
                                             ROWS, CHUNKS, _lanes(channels // groups))

        y = torch.empty_like(x)
        _forward[grid](x, added, y, mean, rstd, weight, bias, channels, rows, groups, has_added, silu, ROWS, COLUMNS)
        context.save_for_backward(x, added, mean, rstd, weight, bias)
        context.groups, context.constants = groups, (has_added, silu, ROWS, COLUMNS)
        context.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    def backward(context: Any, grad_x: Tensor | None, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, added, mean, rstd, weight, bias = context.saved_tensors
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        has_grad_x = grad_x is not None
        grad_x = grad_x.contiguous(memory_format=torch.channels_last) if has_grad_x else x
        (images, channels), rows, groups = x.shape[:2], x.shape[2] * x.shape[3], context.groups
        grid = (images, triton.cdiv(rows, ROWS), triton.cdiv(channels, COLUMNS))
        chunks = grid[1]

        # Means over each group that the gradient of a norm needs.
        sums = x.new_empty((2, images, chunks, channels), dtype=torch.float32)
        means = x.new_empty((2, images * groups), dtype=torch.float32)
        _chunk_gradients[grid](x, added, grad_y, *sums, mean, rstd, weight, bias, channels, rows, chunks, groups,
                               *context.constants)
        _combine_gradients[(images * groups,)](*sums, *means, channels, rows, chunks, groups, CHUNKS,
                                               _lanes(channels // groups))

        result = torch.empty_like(x)
        _backward[grid](x, added, grad_y, grad_x, result, mean, rstd, *means, weight, bias, channels, rows,
                        groups, has_grad_x, *context.constants)
        return result, None, None, None, None, None, None


def _lanes(size: int) -> int:
    """Return the width of the kernels for groups of `size` channels; mostly one value, so that they compile once."""
    return max(LANES, triton.next_power_of_2(size))
