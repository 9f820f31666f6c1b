"""Tiny models with the modules and keys of Stable Diffusion 1."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.oracles import randomize
from ldm.util import instantiate_from_config

WIDTH = 16  # of the text encoder
TEMPLATES = ("a photo of a {}", "the {} in a picture")


def write_text_tower(folder: Path) -> str:
    """Write the config of a small CLIP text tower, without weights; return its folder."""
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408,
              "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "max_position_embeddings": 16, "projection_dim": WIDTH, "hidden_act": "quick_gelu",
              "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def unet_config(**changes: Any) -> dict[str, Any]:
    params = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
              "num_res_blocks": 1, "attention_resolutions": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
              "transformer_depth": 1, "context_dim": WIDTH, "use_checkpoint": False, "legacy": False}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**params, **changes}}


def first_stage_config() -> dict[str, Any]:
    """Return the config of an autoencoder from images of 16 x 16 to latents of 8 x 8."""
    shape = {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
             "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    return {"target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": shape}}


def latent_diffusion_config(folder: Path, target: str = "ddpm.LatentDiffusion", **params: Any) -> dict[str, Any]:
    """Return the section `model` of a config; `folder` receives the text tower's config."""
    shared = {"linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "channels": 4, "scale_factor": 0.18215,
              "conditioning_key": "crossattn", "cond_stage_key": "caption", "unet_config": unet_config(),
              "first_stage_config": first_stage_config(),
              "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                                    "params": {"version": write_text_tower(folder / "tower"), "max_length": 16}}}
    return {"target": f"ldm.models.diffusion.{target}", "params": {**shared, **params}}


def write_weights(folder: Path, seed: int = 0, name: str = "base.ckpt", **params: Any) -> Path:
    """Write a checkpoint of `build_model`; return its path."""
    model = build_model(folder, seed, use_ema=False, **params)
    torch.save({"state_dict": model.state_dict()}, folder / name)
    return folder / name


def build_model(folder: Path, seed: int = 0, **params: Any) -> Any:
    """Return a model of `latent_diffusion_config` with random weights."""
    model = instantiate_from_config(latent_diffusion_config(folder, **params))
    randomize(model.model, seed, scale=0.1)
    randomize(model.first_stage_model, seed + 1)
    _randomise_tower(model.cond_stage_model, seed + 2)
    return model


def _randomise_tower(encoder: nn.Module | None, seed: int) -> None:
    """Fill the encoder with weights so large that encodings differ clearly from word to word."""
    if encoder is not None:
        randomize(encoder, seed, scale=0.3)
