"""The blocks of the U-Net against their formulas."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import randomize

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_is_softmax_attention(new_order: bool) -> None:
    block = randomize(AttentionBlock(64, num_head_channels=32, use_new_attention_order=new_order), scale=0.2)
    x = torch.randn(2, 64, 3, 5)
    flat = x.flatten(2)
    normed = F.group_norm(flat, 32, block.norm.weight, block.norm.bias, 1e-5)
    qkv = block.qkv.weight[..., 0] @ normed + block.qkv.bias[:, None]
    heads = []
    for head in range(2):
        if new_order:
            q, k, v = (qkv[:, 64 * part + 32 * head:][:, :32] for part in range(3))
        else:
            q, k, v = (qkv[:, 96 * head + 32 * part:][:, :32] for part in range(3))
        heads.append(v @ torch.softmax(q.mT @ k / math.sqrt(32), dim=-1).mT)
    expected = flat + block.proj_out.weight[..., 0] @ torch.cat(heads, 1) + block.proj_out.bias[:, None]
    assert torch.allclose(block(x), expected.view_as(x), atol=1e-4)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(UserError, match="num_heads"):
        AttentionBlock(64, num_heads=3)


def test_both_stacking_orders_agree_for_one_head() -> None:
    qkv = torch.randn(2, 24, 6)
    assert torch.allclose(QKVAttentionLegacy(1)(qkv), QKVAttention(1)(qkv))


def test_scale_shift_norm() -> None:
    block = randomize(ResBlock(32, 16, 0.0, out_channels=64, use_scale_shift_norm=True, down=True, use_conv=True))
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    weights = dict(block.named_parameters())

    def conv(name: str, h: torch.Tensor) -> torch.Tensor:
        return F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        return F.group_norm(h, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    h = conv("in_layers.2", F.avg_pool2d(F.silu(norm("in_layers.0", x)), 2))
    scale, shift = F.linear(F.silu(emb), weights["emb_layers.1.weight"], weights["emb_layers.1.bias"]).split(64, dim=1)
    h = norm("out_layers.0", h) * (1 + scale)[..., None, None] + shift[..., None, None]
    expected = conv("skip_connection", F.avg_pool2d(x, 2)) + conv("out_layers.3", F.silu(h))
    assert torch.allclose(block(x, emb), expected, atol=1e-5)


@pytest.mark.parametrize("use_conv", [False, True])
@pytest.mark.parametrize(("dims", "size", "half"), [(1, (8,), (4,)), (2, (8, 4), (4, 2)), (3, (3, 8, 4), (3, 4, 2))])
def test_resampling_of_all_dimensions(dims: int, size: tuple, half: tuple, use_conv: bool) -> None:
    down, up = Downsample(6, use_conv, dims, 6), Upsample(6, use_conv, dims)
    x = torch.randn(1, 6, *size)
    assert down(x).shape == (1, 6, *half)
    assert up(down(x)).shape == x.shape
    if not use_conv:
        assert torch.allclose(down(up(x)), x)


class Shift(TimestepBlock):
    """A user's own layer that reads the timestep embedding."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return x + emb.mean()


def test_a_sequence_passes_what_its_layers_read() -> None:
    transformer = randomize(SpatialTransformer(32, 2, 8, context_dim=12))
    convolution = torch.nn.Conv2d(32, 32, 1)
    layers = TimestepEmbedSequential(Shift(), transformer, convolution)
    x, emb, context = torch.randn(2, 32, 4, 4), torch.ones(2, 6), torch.randn(2, 7, 12)
    assert torch.equal(layers(x, emb, context), convolution(transformer(x + 1, context)))


def test_attention_pool_against_its_formula() -> None:
    pool = randomize(AttentionPool2d(3, 16, 8, 5), scale=0.3)
    x = torch.randn(2, 16, 3, 3)
    positions = torch.cat([x.mean((2, 3))[..., None], x.flatten(2)], -1) + pool.positional_embedding
    qkv = pool.qkv_proj.weight[..., 0] @ positions + pool.qkv_proj.bias[:, None]
    query, key, value = qkv.unflatten(1, (3, 2, 8)).unbind(1)
    weights = (query[..., :1].mT @ key / math.sqrt(8)).softmax(-1)
    expected = (value @ weights.mT).flatten(1) @ pool.c_proj.weight[..., 0].T + pool.c_proj.bias
    assert torch.allclose(pool(x), expected, atol=1e-5)
