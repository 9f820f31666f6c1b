"""A small model with the modules, names and keys of Stable Diffusion XL, and the same weights as a diffusers pipeline.

Sizes that are equal in the real model differ here where possible, so that mistaking one for another fails.
"""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from helpers.oracles import randomize
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.concepts.concept import Concept
from ldm.concepts.fingerprint import base_fingerprint
from ldm.modules.attention import name_text_layers
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.encoders.prompts import word_vector
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "stable-diffusion" / "sd_xl_base.yaml"
TOWERS = Path(__file__).parent / "small_sdxl"
WIDTH_L, WIDTH_G, POOLED, FEATURES, LENGTH = 16, 24, 20, 8, 24
SIDE = 16  # pixels of an image; its latents are 8 x 8
UNET = {"model_channels": 32, "num_head_channels": 16, "transformer_depth": [1, 1, 2], "image_size": 8,
        "context_dim": WIDTH_L + WIDTH_G, "adm_in_channels": POOLED + 6 * FEATURES, "use_checkpoint": False}
FIRST_STAGE = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "resolution": SIDE}
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def small_config(**params: Any) -> DictConfig:
    """Return the public config with small sizes; `params` replace those of the model."""
    config = OmegaConf.load(CONFIG)
    model = config.model.params
    model.image_size = 8
    model.unet_config.params.update(UNET)
    model.first_stage_config.params.ddconfig.update(FIRST_STAGE)
    first, second, *sizes = model.cond_stage_config.params.emb_models
    first.params.update({"version": str(TOWERS / "clip_l"), "max_length": LENGTH, "layer_idx": 2})
    second.params.update({"arch": str(TOWERS / "clip_g.json"), "max_length": LENGTH})
    for embedder in sizes:
        embedder.params.outdim = FEATURES
    model.update(params)
    return config


def small_model(seed: int = 0, **params: Any) -> Any:
    """Return a model of `small_config` with random weights; encodings differ clearly from word to word."""
    return with_random_weights(instantiate_from_config(small_config(**params).model), seed)


def with_random_weights(model: Any, seed: int = 0) -> Any:
    """Fill a model of `small_config` with random weights."""
    randomize(model.model, seed, scale=0.1)
    randomize(model.first_stage_model, seed + 1)
    randomize(model.cond_stage_model, seed + 2, scale=0.3)
    return model


def write_small_model(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write config and single-file weights of `small_model`; return both paths."""
    from safetensors.torch import save_file

    config, weights = folder / "config.yaml", folder / "model.safetensors"
    OmegaConf.save(small_config(), config)
    save_file(public_state(small_model(seed)), weights)
    return config, weights


def public_state(model: Any) -> dict[str, Tensor]:
    """Return the weights as in a public file: U-Net, towers and first stage, without the noise schedule."""
    parts = ("model.diffusion_model.", "first_stage_model.", "conditioner.")
    return {key: value.contiguous() for key, value in model.state_dict().items() if key.startswith(parts)}


def small_concept(model: Any, placeholder: str = "<toy>", super_category: str = "bear", seed: int = 0,
                  **settings: Any) -> Concept:
    """Return a concept for a model of `small_config`: a word near its super-category, with values of its own."""
    encoder, layers = model.cond_stage_model, name_text_layers(model.model.diffusion_model)
    generator = torch.Generator().manual_seed(seed)

    def near(tensor: Tensor, scale: float) -> Tensor:
        return (tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)).detach()

    super_word = word_vector(encoder, super_category)
    embedding = near(super_word, 0.5)
    tokens = encoder.tokenize(["a photo of a <it>"], ["<it>"])
    at_word = (tokens[0] >= encoder.vocabulary_size).nonzero()[0, 0]
    target_input, super_input = (encoder.encode_tokens(tokens, word)[0, at_word].detach()
                                 for word in (embedding, super_word))
    values = {name: near(layer.to_v.weight @ target_input, 1.0) for name, layer in layers.items()}
    spread = torch.linspace(0.5, 2.0, len(target_input))  # C^-1, diagonal
    return Concept(placeholder=placeholder, super_category=super_category, embedding=embedding,
                   target_input=target_input, super_input=super_input, target_outputs_v=values,
                   dual=spread * target_input, word_parts=encoder.word_parts, steps=1,
                   base=base_fingerprint(layers), **settings)


def as_diffusers(model: Any) -> StableDiffusionXLPipeline:
    """Return a pipeline of diffusers with the weights of a model of `small_config`, through diffusers' converters."""
    state = public_state(model)
    tokenizer, tokenizer_2 = tokenizers()
    return StableDiffusionXLPipeline(
        vae=_loaded(AutoencoderKL(**VAE_CONFIG), convert_ldm_vae_checkpoint(state, VAE_CONFIG)),
        text_encoder=_loaded_tower(CLIPTextModel, text_config(WIDTH_L, 24, "quick_gelu", 49407, 16),
                                   convert_ldm_clip_checkpoint(state)),
        text_encoder_2=second_tower(state), tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        unet=_loaded(UNet2DConditionModel(**UNET_CONFIG), convert_ldm_unet_checkpoint(state, UNET_CONFIG)),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True, add_watermarker=False)


def second_tower(state: dict[str, Tensor]) -> CLIPTextModelWithProjection:
    """Return the second tower with the weights of a public file."""
    config = text_config(WIDTH_G, 4 * WIDTH_G, "gelu", 0, POOLED)
    converted = convert_open_clip_checkpoint(SimpleNamespace(config=config), state, prefix=SECOND)
    return _loaded_tower(CLIPTextModelWithProjection, config, converted)


def text_config(width: int, inner: int, activation: str, padding: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=2,
                          vocab_size=49408, max_position_embeddings=LENGTH, hidden_act=activation,
                          projection_dim=projection, bos_token_id=49406, eos_token_id=49407, pad_token_id=padding)


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Return the tokenizers of a public folder: the second one pads with token 0, "!"."""
    return (CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=LENGTH),
            CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=LENGTH, pad_token="!"))


def _loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def _loaded_tower(kind: type[nn.Module], config: CLIPTextConfig, state: dict[str, Tensor]) -> nn.Module:
    """Load converted weights, whether the installed version of transformers names them with `text_model.` or not."""
    tower = kind(config)
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    prefix = "text_model." if any(key.startswith("text_model.") for key in tower.state_dict()) else ""
    outside = ("text_projection.",)
    tower.load_state_dict({key if key.startswith(outside) else prefix + key: value for key, value in bare.items()})
    return tower.eval().requires_grad_(False)


UNET_CONFIG = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (2, 4, 8), "use_linear_projection": True,
    "cross_attention_dim": WIDTH_L + WIDTH_G, "addition_embed_type": "text_time",
    "addition_time_embed_dim": FEATURES, "projection_class_embeddings_input_dim": POOLED + 6 * FEATURES,
    "class_embed_type": None,
}
VAE_CONFIG = {
    "sample_size": SIDE, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64),
    "layers_per_block": 1, "scaling_factor": 0.13025, "force_upcast": True,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}
