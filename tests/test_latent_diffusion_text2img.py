"""LDM's text-to-image model of 1.4 billion parameters: its public checkpoint fits, by diffusers' converters."""
from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from helpers.oracles_bert import diffusers_bert_state
from helpers.stand_ins import model_section
from test_stable_diffusion_v1 import UNET_CONFIG, VAE_CONFIG, config_of_unet, shapes, shapes_of

from ldm.sampling.schedule import diffusion_buffers
from ldm.util import count_params, instantiate_from_config

CONFIG = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
UNET_CONFIG_LDM = {**UNET_CONFIG, "cross_attention_dim": 1280, "sample_size": 32}
TEXT = "cond_stage_model.transformer."


@cache
def public_model(name: str = CONFIG) -> Any:
    with torch.device("meta"):
        return instantiate_from_config(model_section(name))


def test_the_unet_is_what_converters_expect() -> None:
    ours = convert_ldm_unet_checkpoint(public_model().state_dict(), config_of_unet(**UNET_CONFIG_LDM))
    assert shapes(ours) == shapes_of(UNet2DConditionModel, **UNET_CONFIG_LDM)


def test_the_first_stage_is_what_converters_expect() -> None:
    assert shapes(convert_ldm_vae_checkpoint(public_model().state_dict(), VAE_CONFIG)) == shapes_of(
        AutoencoderKL, **VAE_CONFIG)


def test_the_text_encoder_is_what_its_conversion_reads() -> None:
    state = {key.removeprefix(TEXT): value for key, value in public_model().state_dict().items()
             if key.startswith(TEXT)}
    theirs = shapes_of(LDMBertModel, LDMBertConfig())  # its defaults are the public model's shape
    assert shapes(diffusers_bert_state(state)) == {key: shape for key, shape in theirs.items() if "ids" not in key}
    assert set(state) >= {"token_emb.weight", "pos_emb.emb.weight", "attn_layers.layers.63.1.net.2.bias",
                          "attn_layers.layers.62.1.to_out.bias", "norm.weight", "to_logits.weight"}


def test_every_key_of_the_file() -> None:
    model = public_model()
    state = model.state_dict()
    assert len(state) == 686 + 248 + (32 * 13 + 6) + 12  # U-Net, first stage, text encoder, schedule
    assert {key for key in state if "." not in key} == set(diffusion_buffers("linear", 1000))
    parts = (model.model.diffusion_model, model.first_stage_model, model.cond_stage_model)
    assert list(map(count_params, parts)) == [872_300_484, 83_653_863, 581_994_042]
    assert model.latent_shape == (4, 32, 32) and model.cond_stage_trainable


def test_the_concept_config_describes_the_same_base_model() -> None:
    public, trained = (model_section(name)["params"] for name in (CONFIG, "configs/perfusion-ldm.yaml"))
    for part in ("linear_start", "linear_end", "timesteps", "scale_factor", "channels", "conditioning_key",
                 "cond_stage_config", "unet_config", "image_size"):
        assert public[part] == trained[part], part
    model = public_model("configs/perfusion-ldm.yaml")
    assert shapes(model.state_dict()) == shapes(public_model().state_dict())
    assert count_params(model, trainable_only=True) == 0 and len(model.text_layers) == 16
