"""Group norms of feature maps whose channels lie last in memory, with the SiLU behind them, forward and backward.

A group norm of torch's reads and writes maps whose channels come first, so that each one costs two copies of its map,
and as many on the way back, besides a pass of its own for the SiLU. These kernels (Tillet et al. 2019, "Triton") take
the map as convolutions leave it: two passes forward, two backward.

The sums of a group are taken in parts, of a few rows and one channel each: their means and their squared distances from
them, which are then joined (Chan, Golub, LeVeque 1979, "Updating Formulae", Eq. 1.5). So nothing is lost of maps that
are far from 0. All sums are float32.

Shapes: B maps of R positions and C channels (B, R, C) in G groups. A program has ROWS by COLUMNS of a map; one that
joins sums has a group of a map, whose parts it takes PARTS at a time.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, PARTS, LANES = 64, 64, 16, 128


@triton.jit
def _tile(channels, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's rows and columns: where they are in the map, which of them exist, and the columns."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(0).to(tl.int64) * rows * channels
    place = start + row[:, None] * channels + column[None, :]
    return place, (row < rows)[:, None] & (column < channels)[None, :], column


@triton.jit
def _part(parts, channels, column):
    """Where this program's sums are kept, (B, parts, C)."""
    return (tl.program_id(0) * parts + tl.program_id(1)) * channels + column


@triton.jit
def _numbers(x, added, place, there, column, channels, ADDED: tl.constexpr):
    """What is normalized: a tile of x, and to each of its columns what is added there."""
    numbers = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if ADDED:
        shift = tl.load(added + tl.program_id(0) * channels + column, mask=column < channels, other=0.0)
        numbers += shift.to(tl.float32)[None, :]
    return numbers


@triton.jit
def _normal(numbers, mean, deviation, column, channels, groups):
    """The normalized numbers of a tile, and 1 / the standard deviation of each column's group."""
    group = tl.program_id(0) * groups + column // (channels // groups)
    scale = tl.load(deviation + group, mask=column < channels, other=0.0)
    centre = tl.load(mean + group, mask=column < channels, other=0.0)
    return (numbers - centre[None, :]) * scale[None, :], scale


@triton.jit(do_not_specialize=["parts"])
def _moments(x, added, means, squares, channels, rows, parts, ADDED: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr):
    place, there, column = _tile(channels, rows, ROWS, COLUMNS)
    numbers = _numbers(x, added, place, there, column, channels, ADDED)
    count = tl.minimum(rows - tl.program_id(1) * ROWS, ROWS).to(tl.float32)
    centre = tl.sum(tl.where(there, numbers, 0.0), 0) / count
    apart = tl.where(there, numbers - centre[None, :], 0.0)
    kept = _part(parts, channels, column)
    tl.store(means + kept, centre, mask=column < channels)
    tl.store(squares + kept, tl.sum(apart * apart, 0), mask=column < channels)


@triton.jit(do_not_specialize=["parts"])
def _join_moments(means, squares, mean, deviation, channels, rows, parts, groups, epsilon, ROWS: tl.constexpr,
                  PARTS: tl.constexpr, WIDTH: tl.constexpr):
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    size = channels // groups
    lane = tl.arange(0, WIDTH)
    first = image * parts * channels + group * size
    total = tl.zeros((PARTS, WIDTH), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (lane < size)[None, :]
        count = tl.minimum(rows - part * ROWS, ROWS).to(tl.float32)
        total += count[:, None] * tl.load(means + first + part[:, None] * channels + lane[None, :], there, 0.0)
    everything = rows * size
    centre = tl.sum(total) / everything
    total = tl.zeros((PARTS, WIDTH), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (lane < size)[None, :]
        count = tl.minimum(rows - part * ROWS, ROWS).to(tl.float32)
        kept = first + part[:, None] * channels + lane[None, :]
        apart = tl.where(there, tl.load(means + kept, there, 0.0) - centre, 0.0)
        total += tl.load(squares + kept, there, 0.0) + count[:, None] * apart * apart
    tl.store(mean + tl.program_id(0), centre)
    tl.store(deviation + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total) / everything + epsilon))


@triton.jit
def _normalize(x, added, y, mean, deviation, weight, bias, channels, rows, groups, ADDED: tl.constexpr,
               SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place, there, column = _tile(channels, rows, ROWS, COLUMNS)
    numbers = _numbers(x, added, place, there, column, channels, ADDED)
    normal, _ = _normal(numbers, mean, deviation, column, channels, groups)
    slope = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    z = normal * slope[None, :] + shift[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + place, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _gradient_of_normal(gradient, normal, weight, bias, place, there, column, channels, SILU: tl.constexpr):
    """The loss's gradient with respect to the normalized numbers of a tile."""
    slope = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    found = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    if SILU:
        shift = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
        z = normal * slope[None, :] + shift[None, :]
        gate = tl.sigmoid(z)
        found = found * gate * (1.0 + z * (1.0 - gate))
    return found * slope[None, :]


@triton.jit(do_not_specialize=["parts"])
def _sums(x, added, gradient, plain, along, mean, deviation, weight, bias, channels, rows, parts, groups,
          ADDED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place, there, column = _tile(channels, rows, ROWS, COLUMNS)
    numbers = _numbers(x, added, place, there, column, channels, ADDED)
    normal, _ = _normal(numbers, mean, deviation, column, channels, groups)
    found = _gradient_of_normal(gradient, normal, weight, bias, place, there, column, channels, SILU)
    kept = _part(parts, channels, column)
    tl.store(plain + kept, tl.sum(found, 0), mask=column < channels)  # 0 outside of the map, as the gradient is
    tl.store(along + kept, tl.sum(found * normal, 0), mask=column < channels)


@triton.jit(do_not_specialize=["parts"])
def _join_sums(plain, along, plain_mean, along_mean, channels, rows, parts, groups, PARTS: tl.constexpr,
               WIDTH: tl.constexpr):
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    size = channels // groups
    lane = tl.arange(0, WIDTH)
    first = image * parts * channels + group * size
    total, other = tl.zeros((PARTS, WIDTH), tl.float32), tl.zeros((PARTS, WIDTH), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (lane < size)[None, :]
        kept = first + part[:, None] * channels + lane[None, :]
        total += tl.load(plain + kept, there, 0.0)
        other += tl.load(along + kept, there, 0.0)
    tl.store(plain_mean + tl.program_id(0), tl.sum(total) / (rows * size))
    tl.store(along_mean + tl.program_id(0), tl.sum(other) / (rows * size))


@triton.jit
def _backward(x, added, gradient, of_x, result, mean, deviation, plain_mean, along_mean, weight, bias, channels, rows,
              groups, PASSED: tl.constexpr, ADDED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):
    place, there, column = _tile(channels, rows, ROWS, COLUMNS)
    numbers = _numbers(x, added, place, there, column, channels, ADDED)
    normal, scale = _normal(numbers, mean, deviation, column, channels, groups)
    found = _gradient_of_normal(gradient, normal, weight, bias, place, there, column, channels, SILU)
    group = tl.program_id(0) * groups + column // (channels // groups)
    plain = tl.load(plain_mean + group, mask=column < channels, other=0.0)
    along = tl.load(along_mean + group, mask=column < channels, other=0.0)
    found = scale[None, :] * (found - plain[None, :] - normal * along[None, :])
    if PASSED:
        found += tl.load(of_x + place, mask=there, other=0.0).to(tl.float32)
    tl.store(result + place, found.to(result.dtype.element_ty), mask=there)


class GroupNormSiLU(torch.autograd.Function):
    """x (B, C, H, W), and the group norm of it plus what is added to its channels, (B, C) or None, if wanted with SiLU.

    Who reads x as well is to read the one that is given back: the gradients of both are then added up in one pass. A
    gradient for x alone.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int,
                epsilon: float, silu: bool) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        adds, added = added is not None, weight if added is None else added.contiguous()
        (images, channels), rows = x.shape[:2], x.shape[2] * x.shape[3]
        tiles = (images, triton.cdiv(rows, ROWS), triton.cdiv(channels, COLUMNS))
        means, squares = x.new_empty((2, images, tiles[1], channels), dtype=torch.float32)
        mean, deviation = x.new_empty((2, images * groups), dtype=torch.float32)
        y = torch.empty_like(x)
        _moments[tiles](x, added, means, squares, channels, rows, tiles[1], adds, ROWS, COLUMNS)
        _join_moments[(images * groups,)](means, squares, mean, deviation, channels, rows, tiles[1], groups, epsilon,
                                          ROWS, PARTS, _lanes(channels // groups))
        _normalize[tiles](x, added, y, mean, deviation, weight, bias, channels, rows, groups, adds, silu, ROWS, COLUMNS)
        context.save_for_backward(x, added, mean, deviation, weight, bias)
        context.groups, context.how = groups, (adds, silu, ROWS, COLUMNS)
        context.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    def backward(context: Any, of_x: Tensor | None, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, added, mean, deviation, weight, bias = context.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        passed = of_x is not None
        of_x = of_x.contiguous(memory_format=torch.channels_last) if passed else x
        (images, channels), rows, groups = x.shape[:2], x.shape[2] * x.shape[3], context.groups
        tiles = (images, triton.cdiv(rows, ROWS), triton.cdiv(channels, COLUMNS))
        sums = x.new_empty((2, images, tiles[1], channels), dtype=torch.float32)
        means = x.new_empty((2, images * groups), dtype=torch.float32)
        result = torch.empty_like(x)
        _sums[tiles](x, added, gradient, *sums, mean, deviation, weight, bias, channels, rows, tiles[1], groups,
                     *context.how)
        _join_sums[(images * groups,)](*sums, *means, channels, rows, tiles[1], groups, PARTS,
                                       _lanes(channels // groups))
        _backward[tiles](x, added, gradient, of_x, result, mean, deviation, *means, weight, bias, channels, rows,
                         groups, passed, *context.how)
        return result, None, None, None, None, None, None


def _lanes(size: int) -> int:
    """For a group of so many channels; one number for nearly all, so that they need not be compiled for each."""
    return max(LANES, triton.next_power_of_2(size))
