"""A tiny concept encoder with random weights, and its CLIP."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.oracles import randomize
from helpers.tiny_clips import MEAN, STD, tiny_openclip
from helpers.tiny_models import TEMPLATES, WIDTH
from ldm.common.files import save_tensors
from ldm.models.concept_encoder import load_features
from ldm.models.open_clip_folder import SETTINGS
from ldm.modules.concept_encoder import ConceptHead, EncoderSettings, save_encoder


def write_tower(folder: Path) -> Path:
    """Write a CLIP of open_clip for images of 32 x 32; return its folder."""
    trainer = tiny_openclip(max_length=16)
    randomize(trainer.clip.visual, 3, scale=0.1)
    save_tensors(folder / "model.safetensors", trainer.clip.state_dict(), {"format": "pt"})
    settings = {"model_cfg": trainer.settings, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


def write_encoder(folder: Path, base: str = "", **settings: Any) -> Path:
    """Write an encoder with a random head, and its tower; return its folder."""
    tower = write_tower(folder / "clip")
    head = randomize(ConceptHead(load_features(str(tower)).width, WIDTH, width=8), 1, scale=0.1)
    save_encoder(folder, head, EncoderSettings(str(tower), base, TEMPLATES, **settings))
    return folder


def write_cut_outs(folder: Path) -> Path:
    """Write two photos of 16 x 16 with transparent backgrounds, which bring their masks; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[0, 2:12, 2:12, 3] = pixels[1, 4:14, 3:13, 3] = 255
    for number, photo in enumerate(pixels):
        Image.fromarray(photo, "RGBA").save(folder / f"{number}.png")
    return folder
