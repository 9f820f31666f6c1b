from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from helpers.oracles import diffusers_self_attention_state, diffusers_unet_state, randomize
from torch.overrides import TorchFunctionMode

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer, name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules import util
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    Downsample,
    QKVAttention,
    ResBlock,
    UNetModel,
    Upsample,
)
from ldm.modules.edit import Edit, locked_keys

SD1 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True, "transformer_depth": 1,
    "context_dim": 768, "legacy": False, "num_heads": 8,
}
SD2 = {
    **{key: value for key, value in SD1.items() if key != "num_heads"},
    "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024,
}
TEXT = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2],
    "num_res_blocks": 1, "channel_mult": [1, 2], "use_spatial_transformer": True, "context_dim": 12, "legacy": False,
    "num_heads": 4,
}
PLAIN = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2,
}


def batch(width: int = 12, size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, *size, generator=generator)
    return latent, torch.tensor([3, 741]), torch.randn(2, 7, width, generator=generator)


def shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in UNetModel(**config).state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("conv_projections", [True, False], ids=["sd1", "sd2"])
def test_equals_diffusers(conv_projections: bool) -> None:
    three_levels = {**TEXT, "channel_mult": [1, 2, 2]}
    if conv_projections:
        config, their_heads = three_levels, 4
    else:
        of_width_16 = {"num_head_channels": 16, "num_heads": -1, "use_linear_in_transformer": True}
        config, their_heads = {**three_levels, **of_width_16, "num_res_blocks": 2}, (2, 4, 4)
    ours = randomize(UNetModel(**config)).eval()
    theirs = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64, 64), cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=config["num_res_blocks"], attention_head_dim=their_heads,
        use_linear_projection=not conv_projections,
    ).eval()
    theirs.load_state_dict(diffusers_unet_state(ours.state_dict(), config["num_res_blocks"]))
    latent, times, context = batch(size=(8, 12))
    with torch.no_grad():
        expected = theirs(latent, times, context).sample
        got = ours(latent, times, context)
        plain_prompts = ours(latent, times, PromptContext.plain(context))
    assert expected.std() > 0.01
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    assert torch.allclose(plain_prompts, got, atol=1e-6)


def test_without_context_equals_diffusers() -> None:
    ours = randomize(UNetModel(**{**PLAIN, "num_heads": -1, "num_head_channels": 16})).eval()
    theirs = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=16, norm_eps=1e-5, downsample_padding=1,
    ).eval()
    theirs.load_state_dict(diffusers_self_attention_state(ours.state_dict(), 1, head_width=16))
    latent, times, _ = batch()
    with torch.no_grad():
        expected = theirs(latent, times).sample
        assert torch.allclose(ours(latent, times), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_stable_diffusion_1_has_the_public_size_and_keys() -> None:
    state = shapes(SD1)
    assert sum(map(math.prod, state.values())) == 859_520_964
    assert len(state) == 686
    expected = {
        "time_embed.0.weight": (1280, 320), "time_embed.2.bias": (1280,),
        "input_blocks.0.0.weight": (320, 4, 3, 3), "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.4.0.in_layers.2.weight": (640, 320, 3, 3),
        "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "input_blocks.8.1.transformer_blocks.0.ff.net.2.weight": (1280, 5120),
        "input_blocks.10.0.emb_layers.1.weight": (1280, 1280), "input_blocks.11.0.out_layers.3.bias": (1280,),
        "middle_block.1.proj_in.weight": (1280, 1280, 1, 1), "middle_block.1.norm.weight": (1280,),
        "middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
        "middle_block.1.transformer_blocks.0.norm3.weight": (1280,), "middle_block.2.out_layers.0.weight": (1280,),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3), "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.2.conv.weight": (640, 640, 3, 3), "output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
        "output_blocks.11.1.proj_out.weight": (320, 320, 1, 1), "out.0.weight": (320,), "out.2.weight": (4, 320, 3, 3),
    }
    assert {key: state[key] for key in expected} == expected


def test_stable_diffusion_2_has_the_public_size_and_keys() -> None:
    state = shapes(SD2)
    assert sum(map(math.prod, state.values())) == 865_910_724
    assert state["input_blocks.1.1.proj_in.weight"] == (320, 320)
    assert state["output_blocks.3.1.transformer_blocks.0.attn2.to_v.weight"] == (1280, 1024)


def test_text_layers_have_their_paths_as_names() -> None:
    unet = UNetModel(**TEXT)
    layers = name_text_layers(unet)
    assert [layer.layer_name for layer in layers.values()] == list(layers)
    assert len(layers) == 2 + 1 + 4
    assert all(unet.get_submodule(name) is layer for name, layer in layers.items())
    assert "input_blocks.1.1.transformer_blocks.0.attn2" in layers
    assert name_text_layers(UNetModel(**PLAIN)) == {}


@pytest.mark.parametrize(("params", "heads"), [
    ({"num_heads": 4}, {32: 4, 64: 4}),
    ({"num_head_channels": 16, "num_heads": -1}, {32: 2, 64: 4}),
    ({"num_head_channels": 16, "num_heads": 8}, {32: 2, 64: 4}),
    ({"num_heads": 4, "legacy": True}, {32: 4, 64: 4}),
    ({"num_head_channels": 16, "num_heads": -1, "legacy": True}, {32: 2, 64: 4}),
])
def test_heads_of_spatial_transformers(params: dict[str, int], heads: dict[int, int]) -> None:
    unet = UNetModel(**{**TEXT, **params})
    found = {m.norm.num_channels: m.transformer_blocks[0].attn1 for m in unet.modules()
             if isinstance(m, SpatialTransformer)}
    assert {channels: attention.heads for channels, attention in found.items()} == heads
    assert all(attention.to_q.out_features == channels for channels, attention in found.items())


@pytest.mark.parametrize(("params", "down", "up"), [
    ({"num_heads": 2, "num_heads_upsample": 8}, 2, 8),
    ({"num_heads": 2, "num_heads_upsample": 8, "legacy": False}, 2, 2),
    ({"num_heads": -1, "num_head_channels": 8, "num_heads_upsample": 2}, 4, 4),
])
def test_heads_of_attention_blocks(params: dict[str, int], down: int, up: int) -> None:
    unet = UNetModel(**{**PLAIN, **params})
    assert unet.input_blocks[1][1].attention.n_heads == down
    assert unet.output_blocks[-1][1].attention.n_heads == up


def gradients(unet: UNetModel, context: torch.Tensor | PromptContext) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    latent, times, _ = batch()
    unet(latent, times, context).square().sum().backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_checkpointing_gives_the_same_gradients() -> None:
    context = batch()[2]
    stored = gradients(randomize(UNetModel(**TEXT)), context)
    recomputed = gradients(randomize(UNetModel(**TEXT, use_checkpoint=True)), context)
    assert stored.keys() == recomputed.keys() == dict(UNetModel(**TEXT).named_parameters()).keys()
    assert all(torch.allclose(recomputed[name], stored[name], rtol=1e-4, atol=1e-5) for name in stored)


def concept_gradients(recompute: bool) -> list[torch.Tensor]:
    """Return the gradients of the prompts and of a concept's target outputs; the U-Net is frozen."""
    unet = randomize(UNetModel(**TEXT, use_checkpoint=recompute)).requires_grad_(False)
    layers = name_text_layers(unet)
    encoding = batch()[2].requires_grad_()
    target = encoding.detach()[0, 3][None]
    keys = locked_keys(layers, target)
    values = {name: layer.to_v(target).requires_grad_() for name, layer in layers.items()}
    edit = Edit(target, torch.tensor([0.75]), torch.tensor([0.1]), values, keys)
    latent, times, _ = batch()
    unet(latent, times, edit.context(encoding, torch.eye(12))).square().sum().backward()
    assert all(p.grad is None for p in unet.parameters())
    return [encoding.grad, *(value.grad for value in values.values())]


def test_checkpointing_gives_the_same_gradients_of_a_concept() -> None:
    pairs = list(zip(concept_gradients(False), concept_gradients(True), strict=True))
    assert all(stored.abs().max() > 0 for stored, _ in pairs)
    assert all(torch.allclose(recomputed, stored, rtol=1e-4, atol=1e-6) for stored, recomputed in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_precomputed_keys_and_values_equal_those_of_each_layer(cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = randomize(UNetModel(**TEXT)).requires_grad_(False)
    at_once, gradients = predicted_under_a_concept(unet, cache)
    monkeypatch.setattr(unet, "text_layers", {})  # each layer computes its own
    one_by_one, expected = predicted_under_a_concept(unet, cache)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-5)
    for actual, gradient in zip(gradients, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)


def predicted_under_a_concept(unet: UNetModel, cache: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the U-Net's output, and the gradients of the encodings and of all target outputs."""
    layers = name_text_layers(unet)
    latent, times, encoding = batch()
    target = encoding[0, 3][None]
    values = {name: layer.to_v(target).requires_grad_() for name, layer in layers.items()}
    edit = Edit(target, torch.tensor([0.75]), torch.tensor([0.1]), values, locked_keys(layers, target / 2))
    context = edit.context(encoding.requires_grad_(), torch.eye(12), cache=cache)
    predicted = unet(latent, times, context)
    return predicted.detach(), list(torch.autograd.grad(predicted.square().sum(), [encoding, *values.values()]))


def test_keys_and_values_take_two_products_and_follow_changed_weights() -> None:
    unet = randomize(UNetModel(**TEXT)).requires_grad_(False)
    latent, times, encoding = batch()
    with ProductsOfText(unet) as counted:
        before = unet(latent, times, PromptContext.plain(encoding))
    assert counted.count == 2
    weights = {f"{name}.to_v.weight": layer.to_v.weight + 1 for name, layer in name_text_layers(unet).items()}
    replaced = torch.func.functional_call(unet, weights, (latent, times, PromptContext.plain(encoding)))
    for name, weight in weights.items():
        unet.get_parameter(name).copy_(weight)
    assert torch.equal(unet(latent, times, PromptContext.plain(encoding)), replaced)
    assert not torch.allclose(replaced, before)


class ProductsOfText(TorchFunctionMode):
    """Counts the linear maps whose input is as wide as the encodings."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.width, self.count = unet.context_dim, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].shape[-1] == self.width:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_channels_last_gives_the_same_result() -> None:
    unet = randomize(UNetModel(**TEXT))
    latent, times, context = batch()
    expected = unet(latent, times, context)
    unet.to(memory_format=torch.channels_last)
    got = unet(latent.contiguous(memory_format=torch.channels_last), times, context)
    assert torch.allclose(got, expected, atol=1e-5, rtol=1e-4)


def test_runs_in_half_precision() -> None:
    unet = randomize(UNetModel(**TEXT))
    latent, times, context = batch()
    expected = unet(latent, times, context)
    got = unet.to(torch.bfloat16)(latent.bfloat16(), times, context.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - expected).std() < 0.05 * expected.std()


def test_a_new_network_predicts_zero() -> None:
    latent, times, context = batch()
    assert not UNetModel(**TEXT)(latent, times, context).any()


def test_class_labels_and_residual_resampling() -> None:
    unet = randomize(UNetModel(**PLAIN, num_classes=3, resblock_updown=True, use_scale_shift_norm=True))
    assert unet.label_emb.weight.shape == (3, 128)
    latent, times, _ = batch()
    one, other = (unet(latent, times, y=torch.tensor(labels)) for labels in ([0, 1], [0, 2]))
    assert one.shape == latent.shape
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])


@pytest.mark.parametrize(("change", "named"), [
    ({"n_embed": 512}, "n_embed"), ({"num_heads": -1}, "num_head_channels"),
    ({"num_heads": 5}, "num_heads"), ({"num_res_blocks": [1, 1, 1]}, "num_res_blocks"),
    ({"context_dim": None}, "context_dim"), ({"num_head_channels": 24}, "num_head_channels"),
])
def test_impossible_params_are_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        UNetModel(**{**TEXT, **change})


def test_missing_or_unused_inputs_are_refused() -> None:
    latent, times, context = batch()
    with pytest.raises(ValueError, match="needs context"):
        UNetModel(**TEXT)(latent, times)
    with pytest.raises(ValueError, match="no use for context"):
        UNetModel(**PLAIN)(latent, times, context)
    with pytest.raises(ValueError, match="needs timesteps"):
        UNetModel(**PLAIN)(latent)


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
    assert torch.allclose(QKVAttention(1, heads_first=True)(qkv), QKVAttention(1)(qkv))


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


# ---------------------------------------------------------------------------------------------------------------------

def test_timestep_embedding() -> None:
    got = util.timestep_embedding(torch.tensor([0, 250]), 7, max_period=100)
    angles = [250 * 100 ** (-i / 3) for i in range(3)]
    expected = [[1, 1, 1, 0, 0, 0, 0], [*map(math.cos, angles), *map(math.sin, angles), 0]]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-4)


def test_beta_schedules() -> None:
    n, low, high = 50, 1e-3, 2e-2
    ramp = [low + (high - low) * i / (n - 1) for i in range(n)]
    roots = [math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * i / (n - 1) for i in range(n)]
    assert np.allclose(util.make_beta_schedule("linear", n, low, high), [root ** 2 for root in roots])
    assert np.allclose(util.make_beta_schedule("sqrt_linear", n, low, high), ramp)
    assert np.allclose(util.make_beta_schedule("sqrt", n, low, high), [math.sqrt(beta) for beta in ramp])
    cosine = util.make_beta_schedule("cosine", n)
    squares = [math.cos((t / n + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(n)]
    assert np.allclose(np.cumprod(1 - cosine)[:-1], [square / squares[0] for square in squares[1:]])
    assert cosine[-1] == 0.999
    with pytest.raises(UserError, match="cosine"):
        util.make_beta_schedule("quartic", n)


@pytest.mark.parametrize(("method", "steps", "of", "expected"), [
    ("uniform", 5, 1000, [1, 201, 401, 601, 801]), ("uniform", 1, 1000, [1]), ("uniform", 3, 10, [1, 4, 7, 10]),
    ("uniform", 4, 4, [1, 2, 3, 4]), ("quad", 4, 500, [1, 45, 178, 401]),
])
def test_ddim_timesteps(method: str, steps: int, of: int, expected: list[int]) -> None:
    assert util.make_ddim_timesteps(method, steps, of).tolist() == expected


@pytest.mark.parametrize(("method", "steps"), [("uniform", 0), ("uniform", 11), ("cubic", 5)])
def test_impossible_ddim_timesteps_are_refused(method: str, steps: int) -> None:
    with pytest.raises(UserError):
        util.make_ddim_timesteps(method, steps, 10)


def test_extract_into_tensor() -> None:
    got = util.extract_into_tensor(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0]), (2, 3, 4, 4))
    assert got.shape == (2, 1, 1, 1) and got.flatten().tolist() == [7, 5]


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_group_norm_computes_statistics_in_float32(mean: float) -> None:
    """In 16 bits, mean and deviation are rounded once, when they are stored: by half a step of 8 bits each."""
    norm = util.normalization(64).to(torch.bfloat16)
    x = ((torch.randn(2, 64, 32, 32) + mean) * 100).to(torch.bfloat16)
    got, exact = norm(x), F.group_norm(x.float(), 32, eps=1e-5)
    assert got.dtype == torch.bfloat16
    half_a_step = 2.0 ** -9
    allowed = half_a_step * (mean + 2 * exact.abs()) + half_a_step
    assert bool(((got.float() - exact).abs() <= allowed).all())


def test_group_norm_with_other_weights_computes_in_float32() -> None:
    """Only the output is rounded to 8 bits, which is an error of at most 2^-8 of it."""
    norm, x = util.normalization(64), torch.randn(2, 64, 4, 4).to(torch.bfloat16) * 100
    got, exact = norm(x), F.group_norm(x.double(), 32, eps=1e-5)
    assert torch.equal(got, F.group_norm(x.float(), 32, norm.weight, norm.bias, eps=1e-5).to(torch.bfloat16))
    assert bool(((got.double() - exact).abs() <= 2.0 ** -8 * exact.abs() + 1e-6).all())
