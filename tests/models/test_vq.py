"""Autoencoders with a codebook, against diffusers' model and a search through all codes; and their settings."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.oracles import randomize
from helpers.oracles_vae import diffusers_vae_state
from torch import Tensor

from ldm.common.errors import UserError
from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator
from ldm.util import instantiate_from_config

NO_LOSS = {"target": "torch.nn.Identity"}
SETTINGS = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
            "resolution": 16, "z_channels": 4, "double_z": False, "dropout": 0.0}
VQ_LOSS = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
           "params": {"disc_start": 0, "disc_ndf": 8, "perceptual_weight": 0.0, "disc_num_layers": 1}}


def build_model(kind: type[VQModel] = VQModel, embed_dim: int = 3, n_embed: int = 24, lossconfig: Any = None,
          ddconfig: dict[str, Any] | None = None, **params: Any) -> VQModel:
    torch.manual_seed(0)
    model = kind(ddconfig={**SETTINGS, **(ddconfig or {})}, lossconfig=lossconfig or NO_LOSS, n_embed=n_embed,
                 embed_dim=embed_dim, **params)
    return spread_codebook(model)


def spread_codebook(model: VQModel) -> VQModel:
    """Return the model with random weights, and a codebook as spread out as its latents, so that it uses many codes."""
    randomize(model, scale=0.1)
    with torch.no_grad():
        latents = model.encode_to_prequant(random_images())
        scale = latents.std((0, 2, 3)), latents.mean((0, 2, 3))
        noise = torch.randn(model.quantize.embedding.weight.shape, generator=torch.Generator().manual_seed(1))
        model.quantize.embedding.weight.copy_(noise * scale[0] + scale[1])
    return model.eval()


def random_images(count: int = 2, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1


def oracle(model: VQModel, levels: int) -> diffusers.VQModel:
    return diffusers.VQModel(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[level.block[0].conv2.out_channels for level in model.encoder.down],
        layers_per_block=len(model.encoder.down[0].block), latent_channels=model.post_quant_conv.out_channels,
        num_vq_embeddings=model.n_embed, vq_embed_dim=model.embed_dim,
        mid_block_add_attention=hasattr(model.encoder.mid.attn_1, "q"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"ch_mult": (1, 1, 2)}, {"attn_type": "none", "num_res_blocks": 2}])
@torch.no_grad()
def test_equals_diffusers(changes: dict[str, Any]) -> None:
    model, levels = build_model(ddconfig=changes), len({**SETTINGS, **changes}["ch_mult"])
    theirs = oracle(model, levels)
    theirs.load_state_dict(diffusers_vae_state(model.state_dict(), levels))
    theirs.eval()
    x = random_images()
    latents = theirs.encode(x).latents
    quant, loss, (_, _, codes) = model.encode(x)
    their_quant, their_loss, (_, _, their_codes) = theirs.quantize(latents)
    assert torch.allclose(model.encode_to_prequant(x), latents, atol=1e-4)
    assert torch.equal(codes.flatten(), their_codes.flatten()) and len(codes.unique()) > 4
    assert torch.allclose(quant, their_quant, atol=1e-4) and torch.allclose(loss, their_loss, atol=1e-4)
    assert torch.allclose(model.decode(quant), theirs.decode(quant, force_not_quantize=True).sample, atol=1e-4)
    assert torch.allclose(model(x)[0], theirs(x).sample, atol=1e-4)

    interface = build_model(VQModelInterface, ddconfig=changes)
    interface.load_state_dict(model.state_dict())
    assert torch.allclose(interface.encode(x), latents, atol=1e-4)
    for unquantized in (False, True):
        expected = theirs.decode(latents, force_not_quantize=unquantized).sample
        assert torch.allclose(interface.decode(latents, force_not_quantize=unquantized), expected, atol=1e-4)
    assert not torch.allclose(interface.decode(latents), interface.decode(latents, force_not_quantize=True), atol=1e-3)


@torch.no_grad()
def test_codes_are_the_nearest_vectors() -> None:
    model = build_model(sane_index_shape=True)
    x = random_images()
    latents, book = model.encode_to_prequant(x), model.quantize.embedding.weight
    quant, loss, (_, _, codes) = model.encode(x)
    for position in np.ndindex(2, 8, 8):
        image, row, column = position
        latent = latents[image, :, row, column]
        distances = [float((latent - vector).square().sum()) for vector in book]
        assert int(codes[position]) == int(np.argmin(distances))
        assert torch.allclose(quant[image, :, row, column], book[codes[position]], atol=1e-6)
    error = (quant - latents).square().mean()
    assert torch.allclose(loss, 1.25 * error, rtol=1e-4)
    assert torch.allclose(model.decode_code(codes), model.decode(quant), atol=1e-5)
    assert torch.equal(model(x, return_pred_indices=True)[2], codes) and len(model(x)) == 2


def test_gradients_pass_through_quantization() -> None:
    model, x = build_model(), random_images()
    reconstructions, loss = model(x)
    (reconstructions.square().mean() + loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_codes_index_the_remapped_codebook(tmp_path: Path) -> None:
    used = [3, 5, 8, 13]
    np.save(tmp_path / "used.npy", np.array(used))
    plain = build_model(sane_index_shape=True)
    torch.save(plain.state_dict(), tmp_path / "plain.ckpt")
    model = VQModel({**SETTINGS}, NO_LOSS, n_embed=24, embed_dim=3, sane_index_shape=True,
                    remap=str(tmp_path / "used.npy"), ckpt_path=str(tmp_path / "plain.ckpt"))
    codes, all_codes = model.encode(random_images())[2][2], plain.encode(random_images())[2][2]
    assert codes.shape == all_codes.shape and codes.max() < len(used)
    for index, code in enumerate(used):
        assert (codes[all_codes == code] == index).all()


@pytest.mark.parametrize(
    ("params", "named"),
    [({"remap": "nowhere.npy"}, "nowhere.npy"), ({"batch_resize_range": [32]}, "batch_resize_range"),
     ({"batch_resize_range": [32, 16]}, "batch_resize_range"), ({"ddconfig": {"double_z": True}}, "double_z: false"),
     ({"ddconfig": {"chanels": 3}}, "chanels")],
)
def test_bad_settings_are_refused(params: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_model(**params)


def test_batches_are_resized_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build_model(batch_resize_range=[16, 70]), {"image": random_images(side=48)}
    assert model.input_images(batch, "train").shape[2:] == (64, 64)  # the first steps: the largest
    assert model.input_images(batch, "val").shape[2:] == (48, 48)
    monkeypatch.setattr(VQModel, "global_step", 10)
    sides = {model.input_images(batch, "train").shape[2] for _ in range(60)}
    assert sides == {16, 32, 48, 64}


def test_the_public_loss_name_maps_to_our_class() -> None:
    """taming's own class would download a network here."""
    model = build_model(lossconfig={"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                              "params": {"disc_start": 0, "disc_conditional": False, "disc_in_channels": 3}})
    assert type(model.loss) is VQLPIPSWithDiscriminator and model.loss.perceptual_loss is None


def test_learning_rates_of_the_parameter_groups() -> None:
    model = build_model(lossconfig=VQ_LOSS, lr_g_factor=0.5)
    model.learning_rate = 1e-3
    autoencoder, discriminator = model.configure_optimizers()["optimizer"].param_groups
    assert (autoencoder["lr"], discriminator["lr"], autoencoder["betas"]) == (5e-4, 1e-3, (0.5, 0.9))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].startswith("loss.discriminator.") for p in discriminator["params"])
    assert len(autoencoder["params"]) + len(discriminator["params"]) == len(names)


def test_moving_averages(tmp_path: Path) -> None:
    plain = build_model(lossconfig=VQ_LOSS)
    torch.save(plain.state_dict(), tmp_path / "plain.ckpt")
    model = build_model(lossconfig=VQ_LOSS, use_ema=True)
    assert "model_ema.encoderconv_inweight" in model.state_dict()
    started = instantiate_from_config({"target": "ldm.models.autoencoder.VQModel", "params": {
        "ddconfig": {**SETTINGS, "ch_mult": [1, 2]}, "lossconfig": VQ_LOSS, "n_embed": 24, "embed_dim": 3,
        "use_ema": True, "ckpt_path": str(tmp_path / "plain.ckpt")}})
    first = plain.encoder.conv_in.weight.detach().clone()
    assert torch.equal(started.model_ema.encoderconv_inweight, first)
    with torch.no_grad():
        started.encoder.conv_in.weight += 1
    started.on_train_batch_end()
    with started.ema_scope():
        inside = started.encoder.conv_in.weight.detach().clone()
    assert torch.allclose(inside, first + 9 / 11, atol=1e-5)  # the first update keeps 2/11 of the start
    assert torch.allclose(started.encoder.conv_in.weight, first + 1)


@torch.no_grad()
def test_label_maps_are_shown_in_colors() -> None:
    labels = torch.nn.functional.one_hot(torch.randint(5, (2, 16, 16)), 5)  # channels last, as datasets give them
    shape = {**SETTINGS, "in_channels": 5, "out_ch": 5}
    model = VQModel(shape, NO_LOSS, n_embed=24, embed_dim=3, image_key="segmentation", colorize_nlabels=5)
    shown = model.log_images({"segmentation": labels}, N=1)
    assert {name: images.shape for name, images in shown.items()} == dict.fromkeys(
        ("inputs", "reconstructions"), (1, 3, 16, 16))
    colors = shown["inputs"][0].flatten(1).T
    assert len(colors.unique(dim=0)) == 5 and (colors.min(), colors.max()) == (-1, 1)
    expected = model.colorize[:, 2, 0, 0] - model.colorize[:, 1, 0, 0]
    flat = labels[0].flatten(0, 1).argmax(1)
    difference = colors[flat == 2][0] - colors[flat == 1][0]
    assert torch.allclose(difference / difference.norm(), expected / expected.norm(), atol=1e-4)
    plain = VQModel(shape, NO_LOSS, n_embed=24, embed_dim=3, image_key="segmentation")
    assert torch.equal(plain.log_images({"segmentation": labels})["inputs"], labels.movedim(-1, 1)[:, :3])


def test_a_loss_that_trains_nothing_is_refused_when_training_starts() -> None:
    with pytest.raises(UserError, match="Identity trains nothing"):
        build_model().setup("fit")


@torch.no_grad()
def test_reconstructions_with_averages_are_shown_on_request() -> None:
    model = build_model(lossconfig=VQ_LOSS, use_ema=True)
    model.post_quant_conv.bias += 1
    batch = {"image": random_images()}
    assert set(model.log_images(batch)) == {"inputs", "reconstructions"}
    assert set(model.log_images(batch, only_inputs=True)) == {"inputs"}
    shown = model.log_images(batch, plot_ema=True)
    torch.testing.assert_close(shown["reconstructions"], model(batch["image"])[0])
    with model.ema_scope("test"):
        torch.testing.assert_close(shown["reconstructions_ema"], model(batch["image"])[0])


def test_batches_of_the_family_have_channels_last() -> None:
    images = random_images().movedim(1, -1)
    got = build_model().get_input({"image": images}, "image")
    assert torch.equal(got, images.movedim(-1, 1)) and got.is_contiguous()
