"""CLIPs of a few thousand numbers apart from the word table."""
from __future__ import annotations

from pathlib import Path

import torch

from ldm.models.clip import CLIPTrainer
from ldm.models.openclip import OpenCLIPTrainer
from ldm.modules.encoders.modules import TOKENIZER

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 16  # of the pictures that they look at
OPEN_TOWERS = {"text_config": {"width": 16, "layers": 2, "heads": 2}, "embed_dim": 8,
               "vision_config": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}}


def tiny_trainer(seed: int = 0, max_length: int = 16) -> CLIPTrainer:
    """A CLIP in training, of random weights."""
    torch.manual_seed(seed)
    return CLIPTrainer(str(TOKENIZER), TOWER, {**TOWER, "image_size": SIDE, "patch_size": 8}, projection_dim=8,
                       max_length=max_length)


def tiny_openclip(seed: int = 0, max_length: int = 16, **settings: float) -> OpenCLIPTrainer:
    """One of `open_clip`'s in training, its image tower a residual network for pictures of 32 x 32."""
    torch.manual_seed(seed)
    return OpenCLIPTrainer(str(TOKENIZER), **OPEN_TOWERS, max_length=max_length, **settings)


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """One as `transformers` keeps it."""
    tiny_trainer(seed).clip.eval().save_pretrained(folder)
    return folder
