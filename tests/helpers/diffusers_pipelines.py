"""Small models as pipelines of diffusers with the same weights, concepts for them, and the images of our own sampler."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers.oracles import diffusers_unet_state
from helpers.oracles_vae import diffusers_vae_state
from torch import Generator, Tensor
from transformers import CLIPTokenizer

from ldm.concepts.concept import Concept
from ldm.concepts.fingerprint import base_fingerprint
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.attention import name_text_layers
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.rank_one import dual_vectors, invert_covariance

DDIM = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False, "clip_sample": False}
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 2, "use_linear_projection": False}
VAE = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32),
       "layers_per_block": 1, "scaling_factor": 0.18215, "down_block_types": ("DownEncoderBlock2D",) * 2,
       "up_block_types": ("UpDecoderBlock2D",) * 2}
STEPS = 2


def stable_diffusion(model: Any) -> StableDiffusionPipeline:
    """Return the pipeline of a model of `helpers.tiny_models`, with DDIM."""
    encoder = model.cond_stage_model
    unet = UNet2DConditionModel(**UNET, cross_attention_dim=encoder.transformer.config.hidden_size)
    unet.load_state_dict(diffusers_unet_state(model.model.diffusion_model.state_dict(), 1))
    vae = AutoencoderKL(**VAE)
    vae.load_state_dict(diffusers_vae_state(model.first_stage_model.state_dict(), 2))
    text_encoder = type(encoder.transformer)(encoder.transformer.config)
    text_encoder.load_state_dict(encoder.transformer.state_dict())
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, unet=unet, scheduler=DDIMScheduler(**DDIM),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=encoder.max_length),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for module in (vae, text_encoder, unet):
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def make_concept(model: Any, placeholder: str, super_category: str, seed: int, **settings: Any) -> Concept:
    """Return a random concept of a model, whose gate opens at its word."""
    encoder, layers = model.cond_stage_model, name_text_layers(model.model.diffusion_model)
    generator = Generator().manual_seed(seed)

    def encoding_of(vector: Tensor) -> Tensor:
        """Return what the text encoder makes of the word in "a photo of a <word>"."""
        tokens = encoder.tokenize([f"a photo of a {placeholder}"], [placeholder])
        return encoder.encode_tokens(tokens, vector)[0, 5]

    embedding = 0.3 * torch.randn(1, encoder.embedding_width, generator=generator)
    words = encoder.encode_tokens(encoder.tokenize(["a red dog and a box", "one cup on the big table"])).flatten(0, 1)
    target_input = encoding_of(embedding)
    inverse = invert_covariance(words.mT @ words / len(words), ridge=0.1)
    return Concept(
        placeholder=placeholder,
        super_category=super_category,
        embedding=embedding,
        target_input=target_input,
        super_input=encoding_of(torch.randn(embedding.shape, generator=generator)),
        target_outputs_v={name: torch.randn(len(layer.to_v.weight), generator=generator)
                          for name, layer in layers.items()},
        dual=dual_vectors(target_input[None], inverse)[0].cpu(),
        base=base_fingerprint(layers),
        **{"bias": 0.5, "temperature": 0.2, **settings})


def noise(seeds: Sequence[int], model: Any) -> Tensor:
    """Return the starting noise of images with these seeds, as our samplers draw it."""
    shape = model.channels, 8, 8
    return torch.cat([torch.randn(1, *shape, generator=Generator().manual_seed(seed)) for seed in seeds])


def own_images(model: Any, requests: Sequence[GenerationRequest], concepts: Sequence[Concept],
               global_locking: bool = False, guidance_scale: float = 3.0, start: Any = None) -> Tensor:
    """Return the images (B, 3, H, W) of our own sampler, in 0..1."""
    pipeline = PerfusionPipeline(model)
    texts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
    encoded = pipeline.encode(texts, concepts, global_locking, prompt_weights=False)
    settings = GenerationSettings(STEPS, guidance_scale, "ddim", 0.0)
    latents = pipeline.latents(encoded, requests, settings, start)
    with torch.no_grad():
        return (model.decode_first_stage(latents) / 2 + 0.5).clamp(0, 1)


def tokenizer_folder() -> Path:
    return Path(TOKENIZER)
