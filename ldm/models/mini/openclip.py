"""Contrastive training of CLIPs that `open_clip` builds (Ilharco et al., OpenCLIP)."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor

from ldm.models.mini.contrastive import ContrastiveTrainer
from ldm.modules.encoders.openclip import text_features


class OpenCLIPTrainer(ContrastiveTrainer):
    """Trains a CLIP of `open_clip`.

    Args (in addition to those of `ContrastiveTrainer`):
        text_config: settings of `open_clip`'s CLIPTextCfg.
        vision_config: settings of its CLIPVisionCfg. If `layers` is a list, the image tower is the residual network of
            Radford et al.
        embed_dim: width of the embeddings of both towers.
    """

    def __init__(self, tokenizer: str, text_config: Mapping[str, Any], vision_config: Mapping[str, Any],
                 embed_dim: int, **contrastive: Any) -> None:
        super().__init__(tokenizer, **contrastive)
        self.settings = {"embed_dim": embed_dim, "vision_cfg": dict(vision_config), "text_cfg": {
            "context_length": self.max_length, "vocab_size": len(self.tokenizer), **text_config}}
        self.clip = open_clip.CLIP(**self.settings).to(memory_format=torch.channels_last)  # faster convolutions

    def text_features(self, tokens: Tensor) -> Tensor:
        return text_features(self.clip, tokens)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(pixels)
