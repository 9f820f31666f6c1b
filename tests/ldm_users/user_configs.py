"""Configs and checkpoints of tiny models in the layout of the LDM family, one for each kind of model."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.oracles import randomize
from helpers.tiny_models import WIDTH, first_stage_config, latent_diffusion_config, unet_config
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

CLASSES = 5
STEPS_OF_CHAIN = 20  # timesteps of the model whose whole Markov chain a test runs through
PLAIN_UNET = {"use_spatial_transformer": False, "context_dim": None}


def _codebook_stage() -> dict[str, Any]:
    """Return a first stage that encodes to tensors, as inpainting's has it."""
    params = first_stage_config()["params"]
    return {"target": "ldm.models.autoencoder.VQModelInterface",
            "params": {"embed_dim": 4, "n_embed": 32, "ddconfig": {**params["ddconfig"], "double_z": False},
                       "lossconfig": {"target": "ldm.modules.losses.contperceptual.DummyLoss"}}}


def _changes(kind: str) -> dict[str, Any]:
    """Return the params in which a kind of model differs from the one that reads text."""
    if kind == "classes":
        return {"cond_stage_key": "class_label", "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": CLASSES, "embed_dim": WIDTH, "key": "class_label"}}}
    if kind == "inpainting":
        return {"conditioning_key": "concat", "concat_mode": True, "cond_stage_key": "masked_image",
                "cond_stage_config": "__is_first_stage__", "first_stage_config": _codebook_stage(),
                "scale_factor": 1.0, "unet_config": unet_config(in_channels=9, **PLAIN_UNET)}
    if kind == "unconditional":
        return {"cond_stage_config": "__is_unconditional__", "cond_stage_key": "image", "conditioning_key": None,
                "timesteps": STEPS_OF_CHAIN, "log_every_t": 5, "unet_config": unet_config(**PLAIN_UNET)}
    if kind == "hybrid":
        return {"conditioning_key": "hybrid", "unet_config": unet_config(in_channels=8)}
    if kind == "words":
        return {"personalization_config": {
            "target": "ldm.modules.embedding_manager.EmbeddingManager",
            "params": {"placeholder_strings": ["*"], "initializer_words": ["sculpture"], "per_image_tokens": False,
                       "num_vectors_per_token": 1, "progressive_words": False}}}
    return {}


def write_user_files(folder: Path, kind: str = "text", target: str = "ldm.models.diffusion.ddpm.LatentDiffusion",
                     **params: Any) -> Path:
    """Write a config with a learning rate beside target and params; return its path.

    Args:
        kind: "text", "classes", "inpainting", "unconditional", "hybrid" or "words" (with an embedding manager).
        target: class of the model, one of a user perhaps.
        params: more params of the model.
    """
    section = latent_diffusion_config(folder, use_ema=kind == "unconditional", timesteps=1000)
    section["params"] |= {**_changes(kind), **params}
    config = {"model": {"base_learning_rate": 1e-3, "target": target, "params": section["params"]}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def write_checkpoint(config: Path) -> Path:
    """Write random weights for a config beside it; return the file's path."""
    model = instantiate_from_config(OmegaConf.load(config).model)
    randomize(model.model, 0, scale=0.1)
    randomize(model.first_stage_model, 1)
    if model.cond_stage_model is not None and model.cond_stage_model is not model.first_stage_model:
        randomize(model.cond_stage_model, 2, scale=0.3)
    path = config.parent / "model.ckpt"
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, path)
    return path
