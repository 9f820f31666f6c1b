from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from helpers.oracles import diffusers_self_attention_state, diffusers_unet_state, randomize
from torch.overrides import TorchFunctionMode

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer, name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.openaimodel import (
    EncoderUNetModel,
    UNetModel,
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
    edit = Edit(target, target, torch.tensor([0.75]), torch.tensor([0.1]), values, keys)
    latent, times, _ = batch()
    unet(latent, times, edit.context(encoding)).square().sum().backward()
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
    edit = Edit(target, target, torch.tensor([0.75]), torch.tensor([0.1]), values, locked_keys(layers, target / 2))
    context = edit.context(encoding.requires_grad_(), cache=cache)
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
    ({"disable_self_attentions": [True]}, "disable_self_attentions has 1 entries, channel_mult 2"),
    ({"num_attention_blocks": [1, 1, 1]}, "num_attention_blocks"), ({"num_heads": -1}, "num_head_channels"),
    ({"num_classes": "sequential"}, "adm_in_channels"),
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
    with pytest.raises(ValueError, match="no use for y"):
        UNetModel(**PLAIN)(latent, times, y=times)
    with pytest.raises(ValueError, match="needs timesteps"):
        UNetModel(**PLAIN)(latent)


def test_what_a_model_does_not_read_is_ignored() -> None:
    """As in the LDM family, whose callers pass everything to every model."""
    latent, times, context = batch()
    plain = randomize(UNetModel(**PLAIN))
    assert torch.equal(plain(latent, times, context, transformer_options={}), plain(latent, times))


@pytest.mark.parametrize(("num_classes", "y", "layers"), [
    (3, torch.tensor([0, 2]), torch.nn.Embedding), ("continuous", torch.tensor([[0.5], [2.0]]), torch.nn.Linear),
    ("sequential", torch.randn(2, 6), torch.nn.Sequential), ("timestep", torch.tensor([7, 300]), torch.nn.Sequential)])
def test_kinds_of_classes(num_classes: int | str, y: torch.Tensor, layers: type) -> None:
    unet = randomize(UNetModel(**PLAIN, num_classes=num_classes, adm_in_channels=6))
    latent, times, _ = batch()
    assert isinstance(unet.label_emb, layers) and unet.label_emb(y).shape == (2, 128)
    predicted = unet(latent, times, y=y)
    assert not torch.allclose(predicted, unet(latent, times, y=y.flip(0)))
    shifted = unet.time_embed[2].bias + unet.label_emb(y[:1])[0]  # the same as a shifted embedding of the timestep
    unet.num_classes = None
    with torch.no_grad():
        unet.time_embed[2].bias.copy_(shifted)
    torch.testing.assert_close(unet(latent[:1], times[:1]), predicted[:1], rtol=1e-4, atol=1e-4)


def test_predicting_codebook_entries() -> None:
    unet = randomize(UNetModel(**TEXT, n_embed=10))
    latent, times, context = batch()
    assert unet.predict_codebook_ids and unet(latent, times, context).shape == (2, 10, 8, 8)
    assert {"id_predictor.0.weight", "id_predictor.1.weight", "out.2.weight"} <= unet.state_dict().keys()


def attentions(unet: UNetModel) -> dict[str, bool]:
    """Return the names of all spatial transformers, and whether their first attention reads the context."""
    return {name: layer.transformer_blocks[0].attn1.reads_text for name, layer in unet.named_modules()
            if isinstance(layer, SpatialTransformer)}


def test_self_attention_can_be_left_out() -> None:
    everywhere = {**TEXT, "num_res_blocks": [2, 2]}
    assert attentions(UNetModel(**everywhere, num_attention_blocks=[1, 0])) == {
        "input_blocks.1.1": False, "middle_block.1": False, "output_blocks.3.1": False}
    assert attentions(UNetModel(**TEXT, disable_self_attentions=[False, True])) == {
        "input_blocks.1.1": False, "input_blocks.3.1": True, "middle_block.1": False, "output_blocks.0.1": True,
        "output_blocks.1.1": True, "output_blocks.2.1": False, "output_blocks.3.1": False}
    assert attentions(UNetModel(**TEXT, disable_middle_self_attn=True))["middle_block.1"]


def test_the_dtype_that_users_read_and_set() -> None:
    assert UNetModel(**PLAIN).dtype == torch.float32 and UNetModel(**PLAIN).bfloat16().dtype == torch.bfloat16
    assert UNetModel(**PLAIN, use_fp16=True).dtype == torch.float16
    unet = randomize(UNetModel(**PLAIN, use_bf16=True))
    assert unet.dtype == torch.bfloat16
    latent, times, _ = batch()
    predicted = unet(latent, times)
    unet.dtype = torch.float32
    unet.convert_to_fp16()
    assert unet.dtype == torch.float32 and torch.equal(unet(latent, times), predicted)


ENCODER = {**PLAIN, "out_channels": 5, "num_head_channels": 16}


@pytest.mark.parametrize(("pool", "last_width"), [
    ("adaptive", 64), ("attention", 64), ("spatial", 32 + 32 + 32 + 64 + 64), ("spatial_v2", 224)])
def test_the_encoder_half(pool: str, last_width: int) -> None:
    unet = randomize(EncoderUNetModel(**ENCODER, pool=pool, num_classes=3))
    latent, times, _ = batch()
    widths = []
    unet.out[0].register_forward_hook(lambda layer, inputs, _: widths.append(inputs[0].shape[1]))
    assert unet(latent, times).shape == (2, 5) and widths == [last_width]
    whole = UNetModel(**ENCODER).state_dict()
    shared = {key: value.shape for key, value in unet.state_dict().items() if not key.startswith("out.")}
    assert shared == {key: whole[key].shape for key in whole if not key.startswith(("out.", "output_blocks."))}


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(UserError, match="'max' is unknown; choose one of adaptive, attention"):
        EncoderUNetModel(**ENCODER, pool="max")
    with pytest.raises(UserError, match="num_head_channels"):
        EncoderUNetModel(**{**ENCODER, "num_head_channels": -1}, pool="attention")


def test_each_level_may_have_its_own_number_of_blocks() -> None:
    depths = {**TEXT, "transformer_depth": [1, 3]}

    def count_blocks(config: dict[str, object]) -> dict[str, int]:
        with torch.device("meta"):
            unet = UNetModel(**config)
        return {name: len(module.transformer_blocks) for name, module in unet.named_modules()
                if isinstance(module, SpatialTransformer)}

    expected = {"input_blocks.1.1": 1, "input_blocks.3.1": 3, "middle_block.1": 3, "output_blocks.0.1": 3,
                "output_blocks.1.1": 3, "output_blocks.2.1": 1, "output_blocks.3.1": 1}
    assert count_blocks(depths) == expected
    assert count_blocks({**depths, "transformer_depth_middle": 2}) == {**expected, "middle_block.1": 2}
    with pytest.raises(UserError, match="transformer_depth has 3 entries, channel_mult 2; give one per level"):
        count_blocks({**depths, "transformer_depth": [1, 2, 3]})
