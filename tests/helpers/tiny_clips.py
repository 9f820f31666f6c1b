"""Tiny CLIPs and a tiny segmenter, with random weights."""
from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPConfig, CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer

from ldm.models.mini.openclip import OpenCLIPTrainer
from ldm.models.optimization import SharedStepModule
from ldm.modules.encoders.clip import special_tokens
from ldm.modules.encoders.modules import TOKENIZER

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)  # of the segmenter's inputs
SIDE = 16  # pixels, of the CLIP's inputs
OPEN_TOWERS = {"text_config": {"width": 16, "layers": 2, "heads": 2}, "embed_dim": 8,
               "vision_config": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}}


def tiny_openclip(seed: int = 0, max_length: int = 16, **settings: float) -> OpenCLIPTrainer:
    """Return an open_clip CLIP in training, with a residual network for images of 32 x 32."""
    torch.manual_seed(seed)
    return OpenCLIPTrainer(str(TOKENIZER), **OPEN_TOWERS, max_length=max_length, **settings)


def overfit(trainer: SharedStepModule, batch: Mapping[str, Any], steps: int) -> list[float]:
    """Train on one batch; return the loss of each step."""
    optimizer, losses = trainer.configure_optimizers()["optimizer"], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = trainer.step(batch, "train")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Write a CLIP of `transformers`; return its folder."""
    torch.manual_seed(seed)
    words = special_tokens(CLIPTokenizer.from_pretrained(TOKENIZER))
    CLIPModel(CLIPConfig(text_config={**TOWER, **words, "max_position_embeddings": 16}, projection_dim=8,
                         vision_config={**TOWER, "image_size": SIDE, "patch_size": 8})).eval().save_pretrained(folder)
    return folder


def tiny_tokenizer(merges: int = 100) -> CLIPTokenizer:
    """Return CLIP's tokenizer with only its first merges."""
    with gzip.open(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf8") as lines:
        pairs = [tuple(line.split()) for line in itertools.islice(lines, 1, merges + 1)]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    vocabulary = {word: row for row, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs)


def write_segmenter(folder: Path) -> Path:
    """Write a CLIPSeg with 16 channels that works on 32 x 32 pixels in patches of 8; return its folder."""
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(
        text_config={**shape, "vocab_size": rows, "max_position_embeddings": 12, "initializer_factor": 20.0,
                     "bos_token_id": rows - 2, "eos_token_id": rows - 1, "pad_token_id": rows - 1},
        vision_config={**shape, "image_size": 32, "patch_size": 8, "initializer_factor": 20.0},
        projection_dim=16, reduce_dim=8, extract_layers=[0, 1], decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"height": 48, "width": 48}, "image_mean": MEAN, "image_std": STD, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    return folder
