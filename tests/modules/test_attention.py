"""Attention layers and transformer blocks against their formulas."""
from __future__ import annotations

import math

import einops
import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import randomize
from torch import Tensor

from ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
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


@pytest.mark.parametrize("self_attention", [False, True])
def test_attention_against_its_formula(self_attention: bool) -> None:
    layer = randomize(CrossAttention(16, None if self_attention else 10, heads=3, dim_head=8), scale=0.5)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    source = x if self_attention else context
    heads = attend(x @ layer.to_q.weight.T, source @ layer.to_k.weight.T, source @ layer.to_v.weight.T, heads=3)
    expected = heads @ layer.to_out[0].weight.T + layer.to_out[0].bias
    assert torch.allclose(layer(x, None if self_attention else context), expected, atol=1e-5)
    assert list(layer.state_dict()) == [
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"
    ]


def test_masked_tokens_are_not_attended_to() -> None:
    layer = randomize(CrossAttention(16, 10, heads=2, dim_head=8), scale=0.5)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    masked = layer(x, context, mask)
    assert torch.allclose(masked[0], layer(x[:1], context[:1, mask[0]])[0], atol=1e-6)
    assert torch.allclose(masked[1], layer(x, context)[1], atol=1e-6)
    assert torch.equal(layer(x, context, mask.view(2, 1, 5)), masked)


def test_attention_is_uniform_where_every_token_is_masked() -> None:
    """As in the LDM family, which sets masked logits to the lowest number rather than to minus infinity."""
    layer = randomize(CrossAttention(16, 10, heads=2, dim_head=8), scale=0.5)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    expected = layer.to_out(layer.to_v(context).mean(1, keepdim=True)).expand(2, 9, 16)
    assert torch.allclose(layer(x, context, torch.zeros(2, 5, dtype=torch.bool)), expected, atol=1e-5)


def test_there_is_one_class_of_attention() -> None:
    block = BasicTransformerBlock(16, 2, 8, context_dim=10)
    assert type(block.attn1) is type(block.attn2) is CrossAttention is PerfusionCrossAttention
    assert (block.attn2.heads, block.attn2.scale) == (2, 8**-0.5)


def public_forward(self: CrossAttention, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
                   ) -> Tensor:
    """Attention as users of the LDM family replace it, from its public attributes alone."""
    source = x if context is None else context
    query, key, value = (einops.rearrange(part, "b n (h d) -> (b h) n d", h=self.heads)
                         for part in (self.to_q(x), self.to_k(source), self.to_v(source)))
    weights = (query @ key.mT * self.scale).softmax(-1)
    return self.to_out(einops.rearrange(weights @ value, "(b h) n d -> b n (h d)", h=self.heads))


def test_attention_can_be_replaced_as_in_the_ldm_family(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomize(SpatialTransformer(32, 3, 8, depth=2, context_dim=10), scale=0.3)
    x, context = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 10)
    expected = layer(x, context)
    calls = []
    monkeypatch.setattr(CrossAttention, "forward", lambda *args: calls.append(args) or public_forward(*args))
    assert torch.allclose(layer(x, context), expected, atol=1e-4) and len(calls) == 4


def test_blocks_can_be_replaced_as_in_the_ldm_family(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomize(SpatialTransformer(32, 3, 8, context_dim=10), scale=0.3)
    x, context = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 10)
    expected = layer(x, context)

    def forward(self: BasicTransformerBlock, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), context=context if self.disable_self_attn else None) + x
        return self.ff(self.norm3(y := self.attn2(self.norm2(x), context=context) + x)) + y

    calls = []
    monkeypatch.setattr(BasicTransformerBlock, "_forward", lambda *args: calls.append(args) or forward(*args))
    assert torch.allclose(layer(x, context), expected, atol=1e-4) and len(calls) == 1


def test_every_block_can_have_a_context_of_its_own() -> None:
    layer = randomize(SpatialTransformer(32, 3, 8, depth=2, context_dim=[10, 12]), scale=0.3)
    x, contexts = torch.randn(2, 32, 4, 6), [torch.randn(2, 5, 10), torch.randn(2, 3, 12)]
    first, second = layer.transformer_blocks
    assert (first.attn2.to_k.in_features, second.attn2.to_k.in_features) == (10, 12)
    assert not torch.allclose(layer(x, contexts), layer(x, [contexts[0], contexts[1].flip(0)]))


def test_linear_attention_against_its_formula() -> None:
    layer = randomize(LinearAttention(8, heads=2, dim_head=4), scale=0.5)
    x = torch.randn(2, 8, 3, 5)
    qkv = torch.einsum("oi,bihw->bohw", layer.to_qkv.weight[..., 0, 0], x).view(2, 3, 2, 4, 15)
    summary = torch.einsum("bhdn,bhen->bhde", qkv[:, 1].softmax(-1), qkv[:, 2])
    attended = torch.einsum("bhde,bhdn->bhen", summary, qkv[:, 0]).reshape(2, 8, 3, 5)
    assert torch.allclose(layer(x), layer.to_out(attended), atol=1e-5)


class FakeContext(PromptContext):
    """Records the arguments of `keys_values`, and returns modified keys and values."""

    def keys_values(self, layer_name: str, to_k: torch.nn.Linear, to_v: torch.nn.Linear) -> tuple[Tensor, Tensor]:
        self.arguments = layer_name, to_k, to_v
        return to_k(self.encoding) + 1, to_v(self.encoding) * 2


def test_keys_and_values_come_from_the_prompt_context() -> None:
    layer = randomize(CrossAttention(16, 10, heads=2, dim_head=8), scale=0.5)
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
