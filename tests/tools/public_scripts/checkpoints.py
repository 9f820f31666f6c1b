"""Tiny random checkpoints in CompVis's layout, and configs that fit, made from the repositories' own configs.

The configs are read from the public repositories when the tool runs, and their numbers are made small. The models are
built by the original code of a repository (`build_checkpoint.py`), so the keys in the checkpoints are the original's.
"""
from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw

from public_scripts.repositories import COMPVIS_LDM, COMPVIS_SD, CUSTOM, INVERSION, PIX2PIX, RUNWAY, STABILITY
from public_scripts.run import Input, Workplace, launch, launch_order
from public_scripts.towers import OPEN_CLIP_ARCH, WIDTH, clip_tower

BUILDER = Path(__file__).with_name("build_checkpoint.py")


@dataclass(frozen=True)
class TinyModel:
    """A tiny model: a public config with small numbers.

    Attributes:
        config: the config's path, as OWNER--NAME/PATH.
        path: folders for Python's path, as OWNER--NAME/FOLDER; the first one has the `ldm` that builds the checkpoint.
        params: replaced params of the model; keys may be dotted paths.
        clip_width: width of the text tower.
    """

    config: str
    path: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    clip_width: int = WIDTH


SD1_CONFIG = f"{COMPVIS_SD}/configs/stable-diffusion/v1-inference.yaml"
CELEBA_CONFIG = f"{COMPVIS_LDM}/models/ldm/celeba256/config.yaml"
MODELS = {
    "sd1": TinyModel(SD1_CONFIG, (COMPVIS_SD,)),
    "sd1-768": TinyModel(SD1_CONFIG, (COMPVIS_SD,), clip_width=768),
    "sd1-inpainting": TinyModel(f"{RUNWAY}/configs/stable-diffusion/v1-inpainting-inference.yaml", (RUNWAY,)),
    "sd2": TinyModel(f"{STABILITY}/configs/stable-diffusion/v2-inference.yaml", (STABILITY,)),
    "sd2-v": TinyModel(f"{STABILITY}/configs/stable-diffusion/v2-inference-v.yaml", (STABILITY,)),
    "text2img": TinyModel(f"{COMPVIS_LDM}/configs/latent-diffusion/txt2img-1p4B-eval.yaml", (COMPVIS_LDM,)),
    "celeba": TinyModel(CELEBA_CONFIG, (COMPVIS_LDM,), {"image_size": 16}),
    "celeba-20": TinyModel(CELEBA_CONFIG, (COMPVIS_LDM,), {"image_size": 16, "timesteps": 20}),
    "class-conditional": TinyModel(f"{COMPVIS_LDM}/configs/latent-diffusion/cin256-v2.yaml", (COMPVIS_LDM,)),
    "inpainting": TinyModel(f"{COMPVIS_LDM}/models/ldm/inpainting_big/config.yaml", (COMPVIS_LDM,),
                            {"image_size": 16}),
    "inversion-sd1": TinyModel(f"{INVERSION}/configs/stable-diffusion/v1-inference.yaml", (INVERSION,)),
    "inversion-text2img": TinyModel(f"{INVERSION}/configs/latent-diffusion/txt2img-1p4B-eval_with_tokens.yaml",
                                    (INVERSION,)),
    "custom": TinyModel(f"{CUSTOM}/configs/custom-diffusion/finetune_addtoken.yaml", (COMPVIS_SD, CUSTOM),
                        clip_width=768),
    "pix2pix": TinyModel(f"{PIX2PIX}/configs/generate.yaml", (f"{PIX2PIX}/stable_diffusion",)),
}


def shrink(config: DictConfig, model: TinyModel, towers: Path) -> DictConfig:
    """Return a config with small numbers for all of its networks. Depths and factors stay, so sizes still fit."""
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    params = config.model.params
    unet = params.unet_config.params
    unet.update({"model_channels": 32, "num_res_blocks": 1, "use_checkpoint": False, "use_fp16": False})
    unet.channel_mult = [min(factor, 2) for factor in unet.channel_mult]
    if "num_head_channels" in unet:
        unet.num_head_channels = 16
    if "image_size" in model.params:
        unet.image_size = model.params["image_size"]
    if "context_dim" in unet:
        unet.context_dim = model.clip_width
    stage = params.first_stage_config.params
    stage.ddconfig.update({"ch": 32, "num_res_blocks": 1, "ch_mult": [1] * len(stage.ddconfig.ch_mult)})
    if "n_embed" in stage:
        stage.n_embed = 64
    if not isinstance(params.cond_stage_config, str):
        shrink_encoder(params.cond_stage_config, model, towers)
    for key, value in model.params.items():
        OmegaConf.update(params, key, value)
    return config


def shrink_encoder(encoder: DictConfig, model: TinyModel, towers: Path) -> None:
    """Replace the size of a text or class encoder in place."""
    given = encoder.get("params") or {}
    kind = encoder.target.rpartition(".")[2]
    if kind == "FrozenCLIPEmbedder":
        encoder.params = {**given, "version": str(clip_tower(towers, model.clip_width))}
    elif kind == "FrozenOpenCLIPEmbedder":
        encoder.params = {**given, "arch": OPEN_CLIP_ARCH, "version": ""}
    elif kind == "BERTEmbedder":
        encoder.params = {**given, "n_embed": model.clip_width, "n_layer": 2}
    elif kind == "ClassEmbedder":
        encoder.params = {**given, "embed_dim": model.clip_width}


def tiny_config(name: str, place: Workplace) -> DictConfig:
    """Return the config of one of `MODELS`."""
    model = MODELS[name]
    return shrink(OmegaConf.load(place.path_in(model.config)), model, place.folder / "models")


def build(name: str, place: Workplace) -> Path:
    """Return the checkpoint of one of `MODELS`, built by the original code if it is not there.

    Raises:
        LookupError: if a repository is missing, or the original code cannot build the model.
    """
    model, folder = MODELS[name], place.folder / "models" / name
    checkpoint = folder / "model.ckpt"
    if checkpoint.is_file():
        return checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(tiny_config(name, place), folder / "config.yaml")
    order = launch_order(BUILDER, ("config.yaml", "model.ckpt"), [place.path_in(path) for path in model.path],
                         original=True, transformers4=True, hub=place.hub(model.clip_width),
                         stand_ins=("public_scripts.towers:register_open_clip",))
    outcome = launch(order, folder)
    if not outcome.succeeded:
        raise LookupError(f"the original cannot build {name}: {outcome.error}")
    return checkpoint


# What runs find in their folders


def weights(name: str) -> Input:
    """Return a function that puts the checkpoint of a tiny model at a path."""
    def write(place: Workplace, target: Path) -> None:
        target.symlink_to(build(name, place))
    return write


def config(name: str, change: Callable[[DictConfig], None] | None = None) -> Input:
    """Return a function that writes the config of a tiny model, changed by `change`."""
    def write(place: Workplace, target: Path) -> None:
        section = tiny_config(name, place)
        if change is not None:
            change(section)
        OmegaConf.save(section, target)
    return write


def photo(width: int = 64, height: int = 64, seed: int = 0) -> Input:
    """Return a function that writes an image with smooth colors and a circle."""
    def write(place: Workplace, target: Path) -> None:
        colors = numpy.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=numpy.uint8)
        image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
        ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(250, 40, 40))
        image.save(target)
    return write


def mask(width: int = 64, height: int = 64) -> Input:
    """Return a function that writes a mask, white in its right half."""
    def write(place: Workplace, target: Path) -> None:
        image = Image.new("L", (width, height))
        ImageDraw.Draw(image).rectangle((width // 2, 0, width, height), fill=255)
        image.save(target)
    return write


def text(content: str) -> Input:
    """Return a function that writes a text file."""
    def write(place: Workplace, target: Path) -> None:
        target.write_text(content)
    return write


def public(path: str) -> Input:
    """Return a function that copies a file or a folder of a public repository, OWNER--NAME/PATH."""
    def write(place: Workplace, target: Path) -> None:
        source = place.path_in(path)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return write
