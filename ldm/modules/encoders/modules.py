"""Encoders of conditions, at the path that CompVis latent-diffusion's configs name."""
from __future__ import annotations

from typing import Any

from ldm.common.words import split_at_placeholders
from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.clip import TOKENIZER, FrozenCLIPEmbedder
from ldm.modules.encoders.conditions import ClassEmbedder, SpatialRescaler
from ldm.modules.encoders.prompts import AbstractEncoder

__all__ = ["TOKENIZER", "AbstractEncoder", "BERTEmbedder", "BERTTokenizer", "ClassEmbedder", "FrozenCLIPEmbedder",
           "SpatialRescaler", "TransformerEmbedder", "split_at_placeholders"]


def __getattr__(name: str) -> Any:
    """Import `FrozenOpenCLIPEmbedder` on first use: importing open_clip takes a second, which other encoders save."""
    if name != "FrozenOpenCLIPEmbedder":
        raise AttributeError(f"{__name__} has no {name}")
    from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder

    return FrozenOpenCLIPEmbedder
