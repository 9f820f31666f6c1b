"""Stable Diffusion 2.x: public checkpoints fit, with diffusers' converters as the oracle of their layout."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from helpers.stand_ins import ROOT, model_section
from test_stable_diffusion_v1 import UNET_CONFIG, VAE_CONFIG, config_of_unet, shapes, shapes_of
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.modules.attention import name_text_layers
from ldm.sampling.schedule import diffusion_buffers
from ldm.util import count_params, instantiate_from_config

CONFIGS = ("configs/stable-diffusion/v2-inference.yaml", "configs/stable-diffusion/v2-inference-v.yaml")
UNET_CONFIG_2 = {**UNET_CONFIG, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
                   "use_linear_projection": True}
TEXT_CONFIG = {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                 "num_attention_heads": 16, "max_position_embeddings": 77, "hidden_act": "gelu"}
TEXT = "cond_stage_model.model."


@cache
def public_model(name: str = CONFIGS[0]) -> Any:
    """Return the model of a public config, with weights on the meta device."""
    with torch.device("meta"):
        return instantiate_from_config(model_section(name))


@pytest.mark.slow
def test_the_unet_is_what_converters_expect() -> None:
    ours = convert_ldm_unet_checkpoint(public_model().state_dict(), config_of_unet(**UNET_CONFIG_2))
    assert shapes(ours) == shapes_of(UNet2DConditionModel, **UNET_CONFIG_2)


def test_the_first_stage_is_what_converters_expect() -> None:
    ours = convert_ldm_vae_checkpoint(public_model().state_dict(), VAE_CONFIG)
    assert shapes(ours) == shapes_of(AutoencoderKL, **VAE_CONFIG)


def test_the_text_encoder_is_what_converters_expect() -> None:
    """Converters leave out the unused last layer and projection, which are compared by shape here."""
    config = CLIPTextConfig(**TEXT_CONFIG)
    state = public_model().state_dict()
    ours = shapes(convert_open_clip_checkpoint(SimpleNamespace(config=config), state))
    theirs = shapes_of(CLIPTextModel, config)

    def used(weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        short = {key.removeprefix("text_model."): shape for key, shape in weights.items()}
        return {key: shape for key, shape in short.items()
                if not key.startswith("encoder.layers.23.") and "position_ids" not in key}

    assert used(ours) == used(theirs)
    resblocks = [key for key in state if key.startswith(f"{TEXT}transformer.resblocks.")]
    assert len(resblocks) == 24 * 12
    last, first = ({key.replace(f".{n}.", ".N."): shape for key, shape in shapes(state).items()
                    if key.startswith(f"{TEXT}transformer.resblocks.{n}.")} for n in (23, 0))
    assert last == first
    assert {key.removeprefix(TEXT): tuple(value.shape) for key, value in state.items()
            if key.startswith(TEXT) and key not in resblocks} == {
        "positional_embedding": (77, 1024), "text_projection": (1024, 1024), "logit_scale": (),
        "token_embedding.weight": (49408, 1024), "ln_final.weight": (1024,), "ln_final.bias": (1024,)}


def test_every_key_of_the_file() -> None:
    state = public_model().state_dict()
    assert len(state) == 686 + 248 + (24 * 12 + 6) + 12  # U-Net, first stage, text encoder, schedule
    assert {key for key in state if "." not in key} == set(diffusion_buffers("linear", 1000))
    assert state["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    assert {key for key, value in state.items() if not value.is_meta} == set(diffusion_buffers("linear", 1000))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "predicts"), zip(CONFIGS, ("eps", "v"), strict=True))
def test_the_values_of_the_configs(name: str, predicts: str) -> None:
    model = public_model(name)
    parts = (model.model.diffusion_model, model.first_stage_model, model.cond_stage_model)
    assert list(map(count_params, parts)) == [865_910_724, 83_653_863, 354_032_641]
    assert model.parameterization == predicts and model.scale_factor == 0.18215
    assert model.cond_stage_model.layer_idx == 1 and model.cond_stage_model.max_length == 77
    assert float(model.alphas_cumprod[-1]) == pytest.approx(0.0047, abs=5e-5)


@pytest.mark.slow
def test_the_concept_config_describes_the_same_base_model() -> None:
    public, trained = (model_section(name)["params"] for name in (CONFIGS[1], "configs/perfusion-sd-v2.yaml"))
    for part in ("linear_start", "linear_end", "timesteps", "scale_factor", "channels", "conditioning_key",
                 "parameterization", "cond_stage_config"):
        assert public[part] == trained[part], part
    unets = ({key: value for key, value in params["unet_config"]["params"].items() if key != "use_fp16"}
             for params in (public, trained))
    assert next(unets) == next(unets)
    assert public["first_stage_config"]["params"]["ddconfig"] == trained["first_stage_config"]["params"]["ddconfig"]
    model = public_model("configs/perfusion-sd-v2.yaml")
    assert shapes(model.state_dict()) == shapes(public_model().state_dict()) and model.latent_shape == (4, 96, 96)
    assert (ROOT / "configs/perfusion-sd-v2.yaml").read_text().count("parameterization=eps") == 1


def test_a_concept_fits_in_40_kilobytes(tmp_path: Path) -> None:
    layers = name_text_layers(public_model().model.diffusion_model)
    generator = torch.Generator().manual_seed(0)
    concept = Concept(
        placeholder="<my-teddy>", super_category="teddy bear", base="0" * 64, steps=400,
        embedding=torch.randn(1, 1024, generator=generator), target_input=torch.randn(1024, generator=generator),
        super_input=torch.randn(1024, generator=generator),
        target_outputs_v={name: torch.randn(layer.to_v.out_features, generator=generator)
                          for name, layer in layers.items()})
    assert save_perfusion_concepts(tmp_path / "concept.safetensors", [concept]).stat().st_size < 40_000
