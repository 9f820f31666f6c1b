"""CLIPs of a few thousand numbers apart from the word table."""
from __future__ import annotations

from pathlib import Path

import torch

from ldm.models.clip import CLIPTrainer
from ldm.modules.encoders.modules import TOKENIZER

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 16  # of the pictures that they look at


def tiny_trainer(seed: int = 0, max_length: int = 16) -> CLIPTrainer:
    """A CLIP in training, of random weights."""
    torch.manual_seed(seed)
    return CLIPTrainer(str(TOKENIZER), TOWER, {**TOWER, "image_size": SIDE, "patch_size": 8}, projection_dim=8,
                       max_length=max_length)


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """One as `transformers` keeps it."""
    tiny_trainer(seed).clip.eval().save_pretrained(folder)
    return folder
