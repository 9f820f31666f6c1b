"""Attention layers and transformer blocks against their formulas."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import randomize
from torch import Tensor

from ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    PerfusionCrossAttention,
    SpatialTransformer,
    name_text_layers,
)
from ldm.modules.context import PromptContext


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v, computed head by head."""
    width = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        channels = slice(head * width, (head + 1) * width)
        weights = torch.softmax(q[..., channels] @ k[..., channels].mT / math.sqrt(width), dim=-1)
        outputs.append(weights @ v[..., channels])
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("kind", [CrossAttention, PerfusionCrossAttention])
@pytest.mark.parametrize("self_attention", [False, True])
def test_attention_against_its_formula(kind: type[CrossAttention], self_attention: bool) -> None:
    layer = randomize(kind(16, None if self_attention else 10, heads=3, dim_head=8), scale=0.5)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    source = x if self_attention else context
    heads = attend(x @ layer.to_q.weight.T, source @ layer.to_k.weight.T, source @ layer.to_v.weight.T, heads=3)
    expected = heads @ layer.to_out[0].weight.T + layer.to_out[0].bias
    assert torch.allclose(layer(x, None if self_attention else context), expected, atol=1e-5)
    assert list(layer.state_dict()) == [
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"
    ]


class FakeContext(PromptContext):
    """Records the arguments of `keys_values`, and returns modified keys and values."""

    def keys_values(self, layer_name: str, to_k: torch.nn.Linear, to_v: torch.nn.Linear) -> tuple[Tensor, Tensor]:
        self.arguments = layer_name, to_k, to_v
        return to_k(self.encoding) + 1, to_v(self.encoding) * 2


def test_keys_and_values_come_from_the_prompt_context() -> None:
    layer = randomize(PerfusionCrossAttention(16, 10, heads=2, dim_head=8), scale=0.5)
    layer.layer_name = "some_block.attn2"
    x, encoding = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    context = FakeContext(encoding, encoding, encoding.new_zeros(2, 5, 0), {}, {})
    heads = attend(layer.to_q(x), layer.to_k(encoding) + 1, layer.to_v(encoding) * 2, heads=2)
    assert torch.allclose(layer(x, context), layer.to_out(heads), atol=1e-5)
    assert context.arguments == ("some_block.attn2", layer.to_k, layer.to_v)


def test_feed_forward_against_its_formula() -> None:
    x = torch.randn(2, 3, 8)
    gated = randomize(FeedForward(8, dim_out=6, mult=2, glu=True), scale=0.5)
    value, gate = gated.net[0].proj(x)[..., :16], gated.net[0].proj(x)[..., 16:]
    assert torch.allclose(gated(x), gated.net[2](value * F.gelu(gate)), atol=1e-6)
    plain = randomize(FeedForward(8), scale=0.5)
    assert torch.allclose(plain(x), plain.net[2](F.gelu(plain.net[0][0](x))), atol=1e-6)
    assert plain.net[2].weight.shape == (8, 32)


def test_a_block_is_three_residuals() -> None:
    block = randomize(BasicTransformerBlock(16, 2, 8, context_dim=10), scale=0.5)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    h = x + block.attn1(F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias))
    h = h + block.attn2(F.layer_norm(h, (16,), block.norm2.weight, block.norm2.bias), context)
    h = h + block.ff(F.layer_norm(h, (16,), block.norm3.weight, block.norm3.bias))
    assert torch.allclose(block(x, context), h, atol=1e-5)


def test_a_block_without_self_attention_reads_the_context_twice() -> None:
    block = randomize(BasicTransformerBlock(16, 2, 8, context_dim=10, disable_self_attn=True), scale=0.5)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    assert block.attn1.to_k.weight.shape == (16, 10)
    assert list(name_text_layers(block)) == ["attn1", "attn2"]
    assert torch.allclose(block(x, PromptContext.plain(context)), block(x, context), atol=1e-6)


def test_concepts_edit_the_first_attention_too() -> None:
    block = BasicTransformerBlock(16, 2, 8, context_dim=10, disable_self_attn=True)
    randomize(block, scale=0.5)
    name_text_layers(block)
    encoding = torch.randn(2, 5, 10)
    target = {name: torch.randn(1, 16) for name in ("attn1", "attn2")}
    results = []
    for target_layers in ((), ("attn1",), ("attn2",)):
        values = {name: target[name] if name in target_layers else torch.zeros(1, 16) for name in target}
        keys = {name: torch.zeros(1, 16) for name in target}
        context = PromptContext(encoding, encoding, torch.ones(2, 5, 1), values, keys)
        results.append(block(torch.ones(2, 9, 16), context))
    assert all(not torch.allclose(results[0], other, atol=1e-3) for other in results[1:])


def test_a_block_without_text_attends_to_the_image_twice() -> None:
    block = BasicTransformerBlock(16, 2, 8)
    assert block.attn2.to_k.weight.shape == (16, 16)
    assert name_text_layers(block) == {}
    assert block(torch.randn(2, 9, 16)).shape == (2, 9, 16)


@pytest.mark.parametrize("use_linear", [False, True])
def test_spatial_transformer(use_linear: bool) -> None:
    layer = randomize(SpatialTransformer(32, 3, 8, depth=2, context_dim=10, use_linear=use_linear), scale=0.3)
    x, context = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 10)
    h = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).mT
    h = h @ layer.proj_in.weight.view(24, 32).T + layer.proj_in.bias
    for block in layer.transformer_blocks:
        h = block(h, context)
    h = h @ layer.proj_out.weight.view(32, 24).T + layer.proj_out.bias
    expected = x + h.mT.reshape(x.shape)
    for form in (torch.contiguous_format, torch.channels_last):
        assert torch.allclose(layer(x.contiguous(memory_format=form), context), expected, atol=1e-4)
    assert layer.proj_in.weight.ndim == (2 if use_linear else 4)


def test_a_new_spatial_transformer_is_the_identity() -> None:
    x = torch.randn(2, 32, 4, 6)
    assert torch.equal(SpatialTransformer(32, 2, 8, context_dim=10)(x, torch.randn(2, 5, 10)), x)
