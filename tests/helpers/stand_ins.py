"""Public configs made small: the same modules, with so few channels that a test can train them."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from omegaconf import OmegaConf
from torch import Tensor

from helpers import tiny_models

ROOT = Path(__file__).resolve().parents[2]
WIDTH, WORDS, LENGTH = 16, 49408, 20
SEGMENT_CLASSES, FEATURES = 5, 8


def model_section(config: str) -> dict[str, Any]:
    """Return the section `model` of a config: target and params."""
    section = OmegaConf.to_container(OmegaConf.load(ROOT / config).model, resolve=True)
    return {"target": section["target"], "params": section["params"]}


def open_clip_arch(folder: Path) -> str:
    """Register a small architecture with open_clip; return its name."""
    path = folder / "tiny-for-tests.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "embed_dim": WIDTH, "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4},
        "text_cfg": {"context_length": LENGTH, "vocab_size": WORDS, "width": WIDTH, "heads": 2, "layers": 3}}))
    open_clip.add_model_config(path)
    return path.stem


def stand_in(config: str, folder: Path, **params: Any) -> dict[str, Any]:
    """Return the section `model` of a config with small sizes, and with `params` replaced."""
    section = model_section(config)
    given = section["params"]
    unet, stage = given["unet_config"]["params"], given["first_stage_config"]["params"]
    given["image_size"] = 2 ** (len(unet["channel_mult"]) - 1)  # the U-Net halves it to a single position
    unet |= {"model_channels": 32, "num_res_blocks": 1}
    if "context_dim" in unet:
        unet["context_dim"] = WIDTH
    if "num_head_channels" in unet:
        unet["num_head_channels"] = 16
    stage["ddconfig"] |= {"ch": 32, "num_res_blocks": 1, "resolution": image_side(section)}
    if "n_embed" in stage:
        stage["n_embed"] = 12
    if "adm_in_channels" in unet:
        unet |= {"context_dim": 2 * WIDTH, "adm_in_channels": WIDTH + 6 * FEATURES, "transformer_depth": 1}
    if isinstance(given["cond_stage_config"], dict):
        given["cond_stage_config"]["params"] = _small_encoder(given["cond_stage_config"], folder)
    given.update(params)
    return section


def image_side(section: dict[str, Any]) -> int:
    """Return the side of the model's images, in pixels."""
    params = section["params"]
    return params["image_size"] * 2 ** (len(params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)


def _small_encoder(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        "FrozenCLIPEmbedder": {"version": tiny_models.write_text_tower(folder / "tower"), "max_length": 16},
        "FrozenOpenCLIPEmbedder": {"arch": open_clip_arch(folder / "open_clip"), "max_length": LENGTH},
        "BERTEmbedder": {"n_embed": WIDTH, "n_layer": 1}, "ClassEmbedder": {"embed_dim": WIDTH},
        "SpatialRescaler": {"in_channels": SEGMENT_CLASSES},
    }
    name, params = config["target"].rpartition(".")[2], config.get("params") or {}
    return _small_embedders(params, changes) if name == "GeneralConditioner" else {**params, **changes[name]}


def _small_embedders(params: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the params of Stable Diffusion XL's encoders with two small towers and few features per size."""
    first, second, *sizes = params["emb_models"]
    first["params"] |= {**changes["FrozenCLIPEmbedder"], "layer_idx": 1}
    second["params"] |= {**changes["FrozenOpenCLIPEmbedder"], "max_length": first["params"]["max_length"]}
    for embedder in sizes:
        embedder["params"]["outdim"] = FEATURES
    return params


def batch_for(section: dict[str, Any]) -> dict[str, Any]:
    """Return two random images, and a condition of the kind that the config's encoder takes."""
    params = section["params"]
    side = image_side(section)
    batch: dict[str, Any] = {params["first_stage_key"]: torch.rand(2, 3, side, side) * 2 - 1}
    encoder = params["cond_stage_config"]
    if isinstance(encoder, dict):
        batch[params["cond_stage_key"]] = _condition(encoder, side)
    return batch


def _condition(encoder: dict[str, Any], side: int) -> list[str] | Tensor:
    kind = encoder["target"].rpartition(".")[2]
    if kind == "ClassEmbedder":
        return torch.tensor([1, 999])
    if kind == "SpatialRescaler":
        return torch.rand(2, SEGMENT_CLASSES, side, side)
    if encoder["params"].get("use_tokenizer") is False:
        return torch.randint(8192, (2, 92))
    return ["a cat", ""]
