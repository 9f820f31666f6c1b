"""What a set of weights is taken for: every public config's own model, and what is no base model at all."""
from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import tiny_models
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints.diffusers_names import unet_tensors
from ldm.checkpoints.families import identify_family
from ldm.checkpoints.load import load_model, load_weights
from ldm.checkpoints.other_kinds import Role
from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.util import instantiate_from_config

PROJECT = Path(__file__).resolve().parents[2]
Shapes = dict[str, tuple[int, ...]]


@cache
def shapes_of(config: str) -> Shapes:
    """Return the keys and shapes of a config's model, without allocating its weights."""
    section = OmegaConf.to_container(OmegaConf.load(PROJECT / config).model, resolve=True)
    with torch.device("meta"):
        state = instantiate_from_config({"target": section["target"], "params": section["params"]}).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


PUBLIC = {
    "configs/stable-diffusion/v1-inference.yaml": "Stable Diffusion 1.x (context 768)",
    "configs/stable-diffusion/v2-inference.yaml": "Stable Diffusion 2.x (context 1024)",
    "configs/stable-diffusion/v2-inference-v.yaml": "Stable Diffusion 2.x (context 1024)",
    "configs/stable-diffusion/sd_xl_base.yaml": "Stable Diffusion XL (context 2048)",
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": "LDM text-to-image 1.4B (context 1280)",
    "configs/latent-diffusion/cin256-v2.yaml": "a class-conditional latent diffusion model (context 512)",
    "configs/latent-diffusion/celebahq-ldm-vq-4.yaml": "a latent diffusion model without cross-attention",
    "configs/autoencoder/autoencoder_kl_64x64x3.yaml": "a KL autoencoder (f4, 3 channels)",
    "configs/autoencoder/autoencoder_kl_32x32x4.yaml": "a KL autoencoder (f8, 4 channels)",
    "configs/autoencoder/autoencoder_kl_16x16x16.yaml": "a KL autoencoder (f16, 16 channels)",
    "configs/autoencoder/autoencoder_kl_8x8x64.yaml": "a KL autoencoder (f32, 64 channels)",
    "models/first_stage_models/vq-f4/config.yaml": "a VQ autoencoder (f4, 3 channels, 8192 codes)",
    "models/first_stage_models/vq-f4-noattn/config.yaml": "a VQ autoencoder (f4, 3 channels, 8192 codes)",
    "models/first_stage_models/vq-f8/config.yaml": "a VQ autoencoder (f8, 4 channels, 16384 codes)",
    "models/first_stage_models/vq-f8-n256/config.yaml": "a VQ autoencoder (f8, 4 channels, 256 codes)",
    "models/first_stage_models/vq-f16/config.yaml": "a VQ autoencoder (f16, 8 channels, 16384 codes)",
}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), PUBLIC.items())
def test_public_models_are_identified_by_their_shapes(config: str, name: str) -> None:
    family = identify_family(shapes_of(config))
    assert family.name == name
    named = re.findall(r"[\w/.-]+\.yaml", family.advice)
    assert all(Path(path).name == path or (PROJECT / path).is_file() for path in named)
    if "without" in name:
        assert "configs/latent-diffusion/" in family.advice
    else:
        assert any(config.endswith(path) for path in named)


def test_the_bundled_model_is_identified() -> None:
    tensors = read_state_dict(PROJECT / "models" / "mini" / "model.safetensors")
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    assert identify_family(shapes) == ("a base model of this project", "use configs/perfusion.yaml", Role.BASE)


def sizes(**shapes: tuple[int, ...]) -> Shapes:
    return {key.replace("__", "."): shape for key, shape in shapes.items()}


def with_input_channels(config: str, channels: int) -> Shapes:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return {**shapes_of(config), key: (320, channels, 3, 3)}


V1, V2 = "configs/stable-diffusion/v1-inference.yaml", "configs/stable-diffusion/v2-inference.yaml"


@pytest.mark.parametrize(("shapes", "name"), [
    (sizes(lora_unet_down_blocks_0_attentions_0_proj_in__lora_down__weight=(4, 320)), "a LoRA"),
    (sizes(unet__down_blocks__0__attentions__0__attn1__to_q__lora_A__weight=(4, 320)), "a LoRA"),
    (sizes(down_blocks__0__attn1__processor__to_q_lora__down__weight=(4, 320)), "a LoRA"),
    (sizes(lora_te_text_model_encoder_layers_0_mlp_fc1__hada_w1_a=(768, 8)), "a LoRA"),
    (sizes(control_model__input_blocks__0__0__weight=(320, 4, 3, 3)), "a ControlNet"),
    (sizes(controlnet_cond_embedding__conv_in__weight=(16, 3, 3, 3), conv_in__weight=(320, 4, 3, 3)), "a ControlNet"),
    ({"<cat-toy>": (768,)}, "a Textual Inversion embedding"),
    (sizes(emb_params=(3, 1024)), "a Textual Inversion embedding"),
    (sizes(conditioner__embedders__0__transformer__text_model__embeddings__token_embedding__weight=(49408, 768),
        model__diffusion_model__input_blocks__0__0__weight=(320, 4, 3, 3),
        model__diffusion_model__input_blocks__4__1__transformer_blocks__0__attn2__to_k__weight=(640, 2048)),
     "Stable Diffusion XL (context 2048)"),
    (sizes(double_blocks__0__img_attn__qkv__weight=(9216, 3072)),
     "Flux, a diffusion transformer"),
    (sizes(model__diffusion_model__joint_blocks__0__x_block__attn__qkv__weight=(4608, 1536)),
     "Stable Diffusion 3, a diffusion transformer"),
    (sizes(vision_model__embeddings__class_embedding=(768,), text_projection__weight=(768, 768), a=(9,)), "a CLIP"),
])
def test_files_that_are_not_base_models(shapes: Shapes, name: str) -> None:
    assert identify_family(shapes).name == name


@pytest.mark.parametrize(("config", "channels"), [(V1, 9), (V1, 8), (V2, 9), (V2, 5), (V2, 7)])
def test_models_with_additional_input_channels(config: str, channels: int) -> None:
    assert identify_family(with_input_channels(config, channels)).name == (
        f"Stable Diffusion for inpainting, depth or other images ({channels} input channels)")


@pytest.mark.parametrize("shapes", [{}, sizes(a=(1,), b=(1,)), sizes(a=()), sizes(weight=(2, 2), bias=(2,))])
def test_unknown_weights_have_no_family(shapes: Shapes) -> None:
    assert identify_family(shapes) is None


def test_a_diffusers_pipeline_is_identified() -> None:
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=8).state_dict()
    shapes = {f"model.diffusion_model.{key}": tuple(value.shape) for key, value in unet_tensors(theirs).items()}
    assert identify_family(shapes).name == "Stable Diffusion 2.x (context 1024)"


def refusal(config: dict[str, Any], path: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_model(config, path)
    assert str(refused.value).isprintable()
    return str(refused.value)


@pytest.fixture
def small_config(tmp_path: Path) -> dict[str, Any]:
    return {"model": tiny_models.latent_diffusion_config(tmp_path, use_ema=False)}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "advice"), [
    (V1, "use configs/stable-diffusion/v1-inference.yaml"),
    (V2, "use configs/stable-diffusion/v2-inference.yaml if it was made for 512 pixels, v2-inference-v.yaml"),
    ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "configs/perfusion-ldm.yaml"),
    ("configs/autoencoder/autoencoder_kl_32x32x4.yaml", "configs/autoencoder/autoencoder_kl_32x32x4.yaml"),
])
def test_the_error_message_contains_the_advice(small_config: dict[str, Any], tmp_path: Path, config: str, advice: str
                                              ) -> None:
    few = {key: torch.zeros(shape[:2]) for key, shape in shapes_of(config).items()
           if key.endswith("attn2.to_k.weight") or "conv_in.weight" in key or "post_quant_conv.weight" in key
           or "input_blocks.0.0.weight" in key or ".down." in key}
    torch.save({"state_dict": few}, tmp_path / "x.ckpt")
    message = refusal(small_config, tmp_path / "x.ckpt")
    assert "keys missing" in message and "it looks like" in message and advice in message


def test_a_concept_instead_of_its_base_model(small_config: dict[str, Any], tmp_path: Path) -> None:
    concept = Concept("<x>", "cat", torch.ones(1, 4), torch.ones(4), torch.ones(4), {"layer": torch.ones(4)}, base="0")
    path = save_perfusion_concepts(tmp_path / "concept.safetensors", [concept])
    assert "is a concept of this project, not a base model; give it with --concept" in refusal(small_config, path)


def test_textual_inversion_embeddings_of_the_original_code(tmp_path: Path) -> None:
    content = {"string_to_token": {"*": torch.tensor(265)}, "name": "cat",
               "string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(1, 768))})}
    torch.save(content, tmp_path / "embeddings.pt")
    with pytest.raises(UserError, match="Textual Inversion embedding, not a base model; give it with --concept"):
        read_state_dict(tmp_path / "embeddings.pt")


def test_the_same_family_is_not_mentioned(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="choose the config of this checkpoint's model"):
        load_weights(nn.Linear(2, 2), tmp_path / "x.safetensors")
