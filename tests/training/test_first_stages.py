"""The public first stages: each config at full size without weights, and a trained small model of its shape."""
from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import tiny_models
from helpers.lpips_files import write_lpips
from helpers.oracles_vae import diffusers_vae_state
from helpers.training_setup import ROOT, in_project_root, load_state, resume_run, run_main
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.common.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.util import instantiate_from_config

CONFIGS = sorted([*ROOT.glob("configs/autoencoder/*.yaml"), *ROOT.glob("models/first_stage_models/*/config.yaml")])
NAMES = [str(path.relative_to(ROOT)).removesuffix("/config.yaml") for path in CONFIGS]
FACTORS = {"vq-f4": 4, "vq-f4-noattn": 4, "vq-f8": 8, "vq-f8-n256": 8, "vq-f16": 16,
           "kl-f4": 4, "kl-f8": 8, "kl-f16": 16, "kl-f32": 32}
SHRINK_FACTOR = 4  # small models train on images of 64 pixels instead of 256


def test_all_configs_are_tested() -> None:
    assert {path.parent.name for path in CONFIGS} == {*FACTORS, "autoencoder"} and len(CONFIGS) == len(FACTORS) + 4


def section(path: Path, **ddconfig: Any) -> DictConfig:
    """Return the config's section `model` with changes in its shape."""
    model = OmegaConf.masked_copy(OmegaConf.load(path).model, ["target", "params"])
    OmegaConf.update(model, "params.ddconfig", ddconfig, merge=True)
    return model


NARROW = {"ch": 32, "num_res_blocks": 1, "ch_mult": [1]}


def factor(path: Path) -> int:
    return FACTORS.get(path.parent.name) or 256 // int(re.search(r"_(\d+)x\d+x\d+$", path.stem)[1])


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_latents_and_parameters_at_full_size(path: Path) -> None:
    """Latents have the size in the name. Parameters equal those of diffusers, with attention only in the middle."""
    config = section(path)
    with torch.device("meta"), torch.no_grad():
        model = instantiate_from_config(config)
        encoded = model.encode(torch.empty(2, 3, 256, 256))
        latents = encoded.mode() if isinstance(model, AutoencoderKL) else encoded[0]
        images = model.decode(latents)
    side = 256 // factor(path)
    channels = config.params.embed_dim
    assert latents.shape == (2, channels, side, side) and images.shape == (2, 3, 256, 256)
    if "autoencoder_kl" in path.stem:
        assert path.stem.endswith(f"_{side}x{side}x{channels}")
    if not config.params.ddconfig.attn_resolutions:
        shapes = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("loss.")}
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        ours = {key: value.shape for key, value in diffusers_vae_state(tensors, len(model.decoder.up)).items()}
        assert ours == {key: value.shape for key, value in published(config.params).state_dict().items()}


def published(params: Any) -> torch.nn.Module:
    shape = params.ddconfig
    levels = len(shape.ch_mult)
    common = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
              "block_out_channels": [shape.ch * factor for factor in shape.ch_mult], "layers_per_block": 2,
              "latent_channels": shape.z_channels, "mid_block_add_attention": shape.get("attn_type") != "none"}
    with torch.device("meta"):
        if "n_embed" in params:
            return diffusers.VQModel(num_vq_embeddings=params.n_embed, vq_embed_dim=params.embed_dim, **common)
        return diffusers.AutoencoderKL(**common)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of images, and of a perceptual network."""
    images, network = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("lpips")
    for number in range(6):
        Image.effect_noise((64, 64), 40 + number).convert("RGB").save(images / f"{number}.png")
    write_lpips(network)
    return images, network


def train_small_model(path: Path, folders: tuple[Path, Path], folder: Path, *overrides: object, steps: int = 1) -> Path:
    """Train a narrow model of the config's shape, without random crops, and return the log folder."""
    images, network = folders
    params = OmegaConf.load(path).model.params
    attention = [side // SHRINK_FACTOR for side in params.ddconfig.attn_resolutions]
    changes = {"model.params.ddconfig": {"ch": 32, "num_res_blocks": 1, "resolution": 256 // SHRINK_FACTOR,
                                         "attn_resolutions": attention},
               "model.params.lossconfig.params": {"disc_start": 0, "disc_ndf": 8, "perceptual_root": network},
               "data.params": {"batch_size": 2, "num_workers": 0},
               "data.params.train.params": {"size": 256 // SHRINK_FACTOR, "random_crop": "false"},
               "data.params.validation.params": {"size": 256 // SHRINK_FACTOR},
               "lightning.trainer": {"max_steps": steps, "val_check_interval": 1}}
    if "n_embed" in params:
        changes["model.params"] = {"n_embed": 32}
    overridden = [f"{name}.{key}={value}" for name, values in changes.items() for key, value in values.items()]
    with in_project_root():
        run_main(["--base", str(path), "--data_root", str(images), "-l", str(folder), *overridden,
                  *map(str, overrides)])
    (logdir,) = folder.iterdir()
    return logdir


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_small_model_trains(path: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Gradients reach both networks, and a checkpoint holds both, but not the perceptual one."""
    state = load_state(train_small_model(path, folders, tmp_path))
    assert state["global_step"] == 1
    (optimizer,) = state["optimizer_states"]
    autoencoder, discriminator = (group["params"] for group in optimizer["param_groups"])
    for group in (autoencoder, discriminator):
        moved = [optimizer["state"][index]["exp_avg"].abs().sum() > 0 for index in group]
        assert sum(moved) > 0.6 * len(group)
    keys = state["state_dict"].keys()
    assert len(autoencoder) == sum(not key.startswith("loss.") for key in keys)
    assert any(key.startswith("loss.discriminator.") for key in keys) and not any("perceptual" in key for key in keys)
    assert all(value.isfinite().all() for value in state["state_dict"].values())


VQ_F4, KL_F8 = (ROOT / "models" / "first_stage_models" / name / "config.yaml" for name in ("vq-f4", "kl-f8"))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With two batches per step and clipped gradients. A VQ model samples nothing at random."""
    settings = ("lightning.trainer.accumulate_grad_batches=2", "lightning.trainer.gradient_clip_val=0.5",
             "data.params.batch_size=1", "data.params.train.params.size=32", "data.params.validation.params.size=32")
    straight = load_state(train_small_model(VQ_F4, folders, tmp_path / "straight", *settings, steps=3))
    stopped = train_small_model(VQ_F4, folders, tmp_path / "stopped", *settings, steps=2)
    before = load_state(stopped)["state_dict"]
    resumed = load_state(resume_run(stopped, "--max_steps", 3))
    assert resumed["global_step"] == straight["global_step"] == 3
    for key, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    assert not torch.equal(before["decoder.conv_out.weight"], straight["state_dict"]["decoder.conv_out.weight"])


def test_a_missing_perceptual_network_is_named_and_nothing_is_left(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    missing = re.escape(str(nowhere / "vgg16-397923af.pth"))
    with pytest.raises(UserError, match=f"^{missing}: the perceptual loss needs this file"):
        train_small_model(KL_F8, folders, tmp_path / "logs",
                          f"model.params.lossconfig.params.perceptual_root={nowhere}")
    assert not (tmp_path / "logs").exists()


def test_gradients_of_the_two_networks_are_clipped_separately() -> None:
    model: VQModel = instantiate_from_config(section(VQ_F4, **NARROW))
    optimizer = model.configure_optimizers()["optimizer"]
    for group, size in zip(optimizer.param_groups, (100.0, 0.01), strict=True):
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, size)
    lengths = [math.sqrt(sum(p.grad.square().sum().item() for p in group["params"]))
               for group in optimizer.param_groups]
    model.configure_gradient_clipping(optimizer, gradient_clip_val=0.5)
    for group, before in zip(optimizer.param_groups, lengths, strict=True):
        after = math.sqrt(sum(p.grad.square().sum().item() for p in group["params"]))
        assert after == pytest.approx(min(before, 0.5), rel=1e-3)


def test_a_public_checkpoint_loads_without_the_perceptual_network(tmp_path: Path) -> None:
    """The checkpoint holds that network, and a discriminator, which training continues with."""
    config = section(KL_F8, **NARROW)
    model = instantiate_from_config(config)
    public = {**model.state_dict(), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 64, 1, 1),
              "loss.discriminator.main.0.bias": torch.full((64,), 0.5)}
    torch.save({"state_dict": public}, tmp_path / "model.ckpt")
    loaded = instantiate_from_config(config, ckpt_path=str(tmp_path / "model.ckpt"))
    assert all(torch.equal(value, public[key]) for key, value in loaded.state_dict().items())


def test_a_diffusion_model_drops_the_loss_of_its_first_stage(tmp_path: Path) -> None:
    """Its checkpoints leave the loss out; otherwise it could not resume from them."""
    stage = tiny_models.first_stage_config()
    stage["params"]["lossconfig"] = OmegaConf.to_container(OmegaConf.load(KL_F8).model.params.lossconfig)
    model = instantiate_from_config(tiny_models.latent_diffusion_config(tmp_path, first_stage_config=stage))
    assert not any(".loss." in key for key in model.state_dict())
