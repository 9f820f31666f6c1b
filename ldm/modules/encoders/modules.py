"""Encoders of conditions, under the names by which CompVis latent-diffusion's configs call them."""
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
    """`FrozenOpenCLIPEmbedder` when it is asked for: open_clip takes a second that other encoders need not wait for."""
    if name != "FrozenOpenCLIPEmbedder":
        raise AttributeError(f"{__name__} has no {name}")
    from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder

    return FrozenOpenCLIPEmbedder
