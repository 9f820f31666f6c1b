"""Encoders of conditions, under the names by which CompVis latent-diffusion's configs call them."""
from __future__ import annotations

from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.clip import TOKENIZER, FrozenCLIPEmbedder
from ldm.modules.encoders.conditions import ClassEmbedder, SpatialRescaler
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder
from ldm.modules.encoders.prompts import AbstractEncoder, split_at_placeholders

__all__ = ["TOKENIZER", "AbstractEncoder", "BERTEmbedder", "BERTTokenizer", "ClassEmbedder", "FrozenCLIPEmbedder",
           "FrozenOpenCLIPEmbedder", "SpatialRescaler", "TransformerEmbedder", "split_at_placeholders"]
