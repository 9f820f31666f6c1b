"""The first stage against diffusers' implementation, and its options that diffusers does not have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import vae
from helpers.oracles import randomize
from helpers.oracles_vae import diffusers_vae_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, image_batch
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Downsample, Encoder, ResnetBlock, Upsample, make_attn

SETTINGS = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2, 4, 4),
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 32,
    "z_channels": 4,
    "double_z": True,
    "dropout": 0.0,
}
NO_LOSS = {"target": "torch.nn.Identity"}


def first_stage(embed_dim: int = 4, **changes: Any) -> AutoencoderKL:
    model = AutoencoderKL({**SETTINGS, **changes}, NO_LOSS, embed_dim)
    return randomize(model, scale=0.1).eval()


def oracle(model: AutoencoderKL, config: Mapping[str, Any]) -> diffusers.AutoencoderKL:
    levels = len(config["ch_mult"])
    widths = [config["ch"] * factor for factor in config["ch_mult"]]
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=widths,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        mid_block_add_attention=config.get("attn_type", "vanilla") != "none",
    )
    theirs.load_state_dict(diffusers_vae_state(model.state_dict(), levels))
    return theirs.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_res_blocks": 2, "ch_mult": (1, 2)},
        {"ch_mult": (1, 3, 2)},
        {"attn_type": "none", "ch_mult": (1, 2)},
        {"z_channels": 8, "ch_mult": (1,)},
    ],
)
@torch.no_grad()
def test_equals_diffusers(changes: dict[str, Any]) -> None:
    config = {**SETTINGS, **changes}
    model = first_stage(config["z_channels"], **changes)
    theirs = oracle(model, config)
    x = torch.rand(2, 3, 24, 32) * 2 - 1
    moments = model.encode(x).parameters
    assert torch.allclose(moments, theirs.encode(x).latent_dist.parameters, atol=1e-4)
    side = 2 ** (len(config["ch_mult"]) - 1)
    assert moments.shape == (2, 2 * config["z_channels"], 24 // side, 32 // side)
    z = torch.randn(2, config["z_channels"], 4, 3)
    assert torch.allclose(model.decode(z), theirs.decode(z).sample, atol=1e-4)


@torch.no_grad()
def test_attention_within_levels_equals_diffusers() -> None:
    """Attention at side 16 of 32 is on the second level. The oracle is composed of diffusers' blocks."""
    model = first_stage(ch_mult=(1, 2), attn_resolutions=[16])
    assert [len(level.attn) for level in model.encoder.down] == [0, 1]
    assert [len(level.attn) for level in model.decoder.up] == [0, 2]
    theirs = vae.Encoder(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        out_channels=4,
    )
    # Diffusers' block has several heads; ours has a single one, as in the papers.
    for block in (theirs.down_blocks[1].attentions[0], theirs.mid_block.attentions[0]):
        block.heads = 1
        block.scale = 64**-0.5
    state = {f"encoder.{key}": value for key, value in model.encoder.state_dict().items()}
    renamed = {key.removeprefix("encoder."): value for key, value in diffusers_vae_state(state, 2).items()}
    theirs.load_state_dict(renamed)
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(model.encoder(x), theirs.eval()(x), atol=1e-4)


def test_stable_diffusions_first_stage_has_the_published_size() -> None:
    public = {**SETTINGS, "ch": 128, "num_res_blocks": 2, "resolution": 256}
    with torch.device("meta"):
        model = AutoencoderKL(public, NO_LOSS, 4)
        published = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    state = diffusers_vae_state(model.state_dict(), 4)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in published.state_dict().items()
    }


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(patch=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
@torch.no_grad()
def test_patch_size_folds_pixels_into_channels(patch: int, seed: int) -> None:
    """A model with patches equals a model without them on folded pixels."""
    config = {**SETTINGS, "ch_mult": (1, 2)}
    folded = {**config, "in_channels": 3 * patch**2, "out_ch": 3 * patch**2}
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, 16, 8 * patch, generator=generator)
    pairs = (
        (Encoder(**config, patch_size=patch), Encoder(**folded)),
        (Decoder(**config, patch_size=patch), Decoder(**folded)),
    )
    for ours, plain in pairs:
        plain.load_state_dict(randomize(ours, seed, scale=0.1).state_dict())
    features = pairs[0][0](x)
    blocks = x.view(1, 3, 16 // patch, patch, 8, patch).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    assert torch.allclose(features, pairs[0][1](blocks), atol=1e-6)
    assert features.shape == (1, 8, 8 // patch, 4)
    z = features[:, :4]
    grid = (
        pairs[1][1](z).view(1, 3, patch, patch, 16 // patch, 8).permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 16, 8 * patch)
    )
    assert torch.allclose(pairs[1][0](z), grid, atol=1e-6)


def test_attn_resolutions_are_sides_after_folding() -> None:
    encoder = Encoder(**{**SETTINGS, "ch_mult": (1, 2), "attn_resolutions": [8]}, patch_size=4)
    decoder = Decoder(**{**SETTINGS, "ch_mult": (1, 2), "attn_resolutions": [8]}, patch_size=4)
    assert [len(level.attn) for level in encoder.down] == [1, 0]
    assert [len(level.attn) for level in decoder.up] == [2, 0]


def test_resampling_without_convolutions() -> None:
    x = torch.randn(1, 2, 4, 6)
    means = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    assert torch.allclose(Downsample(2, with_conv=False)(x), means, atol=1e-6)
    assert torch.equal(Upsample(2, with_conv=False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert not [*Downsample(2, False).state_dict(), *Upsample(2, False).state_dict()]


def test_attention_against_the_formula() -> None:
    block = randomize(AttnBlock(32), scale=0.3)
    x = torch.randn(1, 32, 3, 2)
    normed = F.group_norm(x, 32, block.norm.weight, block.norm.bias, 1e-6)
    q, k, v = (
        (layer.weight.flatten(1) @ normed.flatten(2) + layer.bias[:, None])[0] for layer in (block.q, block.k, block.v)
    )
    mixed = v @ torch.softmax(q.T @ k / 32**0.5, dim=1).T
    expected = x + (block.proj_out.weight.flatten(1) @ mixed + block.proj_out.bias[:, None]).view(x.shape)
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_shortcuts_of_residual_blocks() -> None:
    wide = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True)
    narrow = ResnetBlock(in_channels=32, out_channels=64)
    assert wide.conv_shortcut.weight.shape == (64, 32, 3, 3) and narrow.nin_shortcut.weight.shape == (64, 32, 1, 1)
    for block, shortcut in ((wide, wide.conv_shortcut), (narrow, narrow.nin_shortcut)):
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
        x = torch.randn(1, 32, 4, 4)
        assert torch.allclose(block(x), shortcut(x), atol=1e-6)


def test_tanh_out_and_give_pre_end() -> None:
    config = {**SETTINGS, "ch_mult": (1, 2)}
    plain, squashed, early = (Decoder(**config, **extra) for extra in ({}, {"tanh_out": True}, {"give_pre_end": True}))
    randomize(plain, scale=0.2)
    for other in (squashed, early):
        other.load_state_dict(plain.state_dict())
    z = torch.randn(1, 4, 4, 4)
    assert torch.allclose(squashed(z), plain(z).tanh(), atol=1e-6)
    assert early(z).shape == (1, 32, 8, 8)
    assert torch.allclose(plain.conv_out(F.silu(plain.norm_out(early(z)))), plain(z), atol=1e-6)
    assert plain.last_layer is plain.conv_out.weight


def test_ddconfig_may_hold_decoder_settings() -> None:
    model = first_stage(ch_mult=(1,), tanh_out=True)
    assert model.decode(100 * torch.randn(1, 4, 4, 4)).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"chanels": 3}, "chanels"), ({"attn_type": "quadratic"}, "quadratic"), ({"double_z": False}, "double_z")],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        first_stage(**changes)


def test_kinds_of_attention() -> None:
    assert isinstance(make_attn(32, "vanilla-xformers"), AttnBlock)
    assert isinstance(make_attn(32, "none"), nn.Identity)
    linear = make_attn(32, "linear")
    assert linear.heads == 1 and linear.to_qkv.out_channels == 96
    encoder = Encoder(**SETTINGS, use_linear_attn=True, some_other_setting=1)
    assert type(encoder.mid.attn_1) is type(linear)


def test_residual_blocks_with_a_timestep_embedding() -> None:
    block = randomize(ResnetBlock(in_channels=32, out_channels=64, dropout=0.0, temb_channels=8), scale=0.2)
    x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
    with_embedding = block(x, temb)
    assert not torch.allclose(block(x), with_embedding, atol=1e-3)
    with torch.no_grad():
        block.conv1.bias += block.temb_proj(F.silu(temb))[0]
    assert torch.allclose(block(x), with_embedding, atol=1e-5)


def test_reconstruction_from_a_sample_or_from_the_mean() -> None:
    model = first_stage(ch_mult=(1,))
    x = torch.rand(1, 3, 8, 8)
    mean, posterior = model(x, sample_posterior=False)
    assert torch.allclose(mean, model.decode(posterior.mean), atol=1e-6)
    assert not torch.allclose(model(x)[0], mean, atol=1e-3)


def test_weights_load_from_a_file(tmp_path: Path) -> None:
    model = first_stage(ch_mult=(1,))
    torch.save(
        {"state_dict": {**model.state_dict(), "loss.discriminator.main.0.weight": torch.ones(2)}}, tmp_path / "a.ckpt"
    )
    again = AutoencoderKL({**SETTINGS, "ch_mult": (1,)}, NO_LOSS, 4, ckpt_path=str(tmp_path / "a.ckpt"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_training_reduces_the_loss_and_trains_every_parameter() -> None:
    model = AutoencoderKL(
        {**SETTINGS, "ch_mult": (1,)}, {"target": "ldm.modules.losses.reconstruction.ReconstructionKL"}, 4
    )
    model.learning_rate = 1e-2
    optimizer = model.configure_optimizers()["optimizer"]
    batch = {"image": torch.rand(2, 3, 8, 8) * 2 - 1}
    losses = []
    for _ in range(8):
        reconstructions, posterior = model(batch["image"], sample_posterior=False)
        loss, _ = model.loss(batch["image"], reconstructions, posterior)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()} and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 6, 3), (2, 3, 8, 6)),
        ((2, 3, 8, 6), (2, 3, 8, 6)),
        ((2, 1, 8, 3), (2, 1, 8, 3)),
        ((2, 8, 6, 1), (2, 1, 8, 6)),
    ],
)
def test_batches_of_both_layouts(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images: Tensor = torch.rand(shape, dtype=torch.float64)
    got = image_batch({"picture": images}, "picture")
    assert (got.shape, got.dtype) == (expected, torch.float32)
    moved = images if shape == expected else images.movedim(-1, 1)
    assert torch.equal(got, moved.float())


def test_identity_first_stage() -> None:
    x = torch.rand(1, 3, 4, 4)
    stage = IdentityFirstStage()
    assert stage.encode(x) is x and stage.decode(x) is x and stage(x) is x


def test_identity_first_stage_takes_any_params_and_quantizes_nothing() -> None:
    x = torch.rand(1, 3, 4, 4)
    assert IdentityFirstStage(7, embed_dim=4).quantize(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x) == (x, None, [None, None, None])


def test_posteriors_are_contiguous_in_any_memory_format() -> None:
    """Noise like a latent then has the order of the family's."""
    model = first_stage(ch_mult=(1, 1)).to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert model.encode(x).parameters.is_contiguous() and model.encode(x).mode().is_contiguous()


@torch.no_grad()
def test_images_for_the_log() -> None:
    model = first_stage(ch_mult=(1,)).eval()
    batch = {"image": torch.rand(3, 8, 8, 3)}
    torch.manual_seed(3)
    shown = model.log_images(batch, split="train")
    torch.manual_seed(3)
    reconstructions, posterior = model(batch["image"].movedim(-1, 1))
    assert set(shown) == {"inputs", "reconstructions", "samples"}
    torch.testing.assert_close(shown["reconstructions"], reconstructions)
    torch.testing.assert_close(shown["samples"], model.decode(torch.randn_like(posterior.sample())))
    assert set(model.log_images(batch, only_inputs=True)) == {"inputs"}
    assert len(model.log_images(batch, N=2)["samples"]) == 2


def test_averages_of_an_autoencoder() -> None:
    model = AutoencoderKL({**SETTINGS, "ch_mult": (1,)}, NO_LOSS, 4, ema_decay=0.5)
    start = model.quant_conv.bias.detach().clone()
    with torch.no_grad():
        model.quant_conv.bias += 1
    model.on_train_batch_end(None, None, 0)
    with model.ema_scope("test"), torch.no_grad():
        assert torch.allclose(model.quant_conv.bias, start + 9 / 11)  # the first update keeps 2/11 of the start
    shown = model.log_images({"image": torch.rand(1, 3, 8, 8)})
    assert {"samples_ema", "reconstructions_ema"} < set(shown)
    assert not hasattr(first_stage(ch_mult=(1,)), "model_ema")


def test_init_from_ckpt_takes_what_fits_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = first_stage(ch_mult=(1,))
    torch.save({"state_dict": {"quant_conv.bias": torch.ones(8)}}, tmp_path / "part.ckpt")
    model.init_from_ckpt(tmp_path / "part.ckpt")
    assert model.quant_conv.bias.tolist() == [1.0] * 8 and "keys missing" in caplog.text
    with pytest.raises(UserError, match="keys missing"):
        AutoencoderKL({**SETTINGS, "ch_mult": (1,)}, NO_LOSS, 4, ckpt_path=str(tmp_path / "part.ckpt"))


def test_a_learned_variance_of_the_loss() -> None:
    loss = {"target": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
            "params": {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0}}
    settings = {**SETTINGS, "ch_mult": (1,)}
    learned, fixed = (AutoencoderKL(settings, loss, 4, learn_logvar=learn) for learn in (True, False))
    assert any(p is learned.loss.logvar for p in learned.trained_parameters()) and learned.loss.logvar.requires_grad
    assert not any(p is fixed.loss.logvar for p in fixed.trained_parameters())
    assert learned.get_last_layer() is learned.decoder.conv_out.weight
