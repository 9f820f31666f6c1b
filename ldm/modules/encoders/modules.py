"""Encoders of conditions, at the path that CompVis latent-diffusion's configs name."""
from __future__ import annotations

from ldm.common.lazy_imports import forward_names
from ldm.common.words import split_at_placeholders
from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.clip import TOKENIZER, FrozenCLIPEmbedder
from ldm.modules.encoders.conditions import ClassEmbedder, SpatialRescaler
from ldm.modules.encoders.prompts import AbstractEncoder, IdentityEncoder

__all__ = ["TOKENIZER", "AbstractEncoder", "BERTEmbedder", "BERTTokenizer", "ClassEmbedder", "FrozenCLIPEmbedder",
           "IdentityEncoder", "SpatialRescaler", "TransformerEmbedder", "split_at_placeholders"]

# Imported on first use: importing open_clip takes a second, which other encoders save.
__getattr__ = forward_names(__name__, {
    "ConcatTimestepEmbedderND": "ldm.modules.encoders.sizes",
    "GeneralConditioner": "ldm.modules.encoders.conditioner",
    "CLIPEmbeddingNoiseAugmentation": "ldm.modules.encoders.image_embedders",
    "ClipImageEmbedder": "ldm.modules.encoders.image_embedders",
    "FrozenCLIPT5Encoder": "ldm.modules.encoders.t5",
    "FrozenCLIPTextEmbedder": "ldm.modules.encoders.clip_features",
    "FrozenClipImageEmbedder": "ldm.modules.encoders.clip_features",
    "FrozenOpenCLIPEmbedder": "ldm.modules.encoders.openclip",
    "FrozenOpenCLIPEmbedder2": "ldm.modules.encoders.openclip",
    "FrozenOpenCLIPImageEmbedder": "ldm.modules.encoders.image_embedders",
    "FrozenT5Embedder": "ldm.modules.encoders.t5",
})
