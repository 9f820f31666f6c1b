"""CLIPs as `open_clip` builds them (Ilharco et al., OpenCLIP): trained here, and read from folders in its layout."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor

from ldm.models.mini.contrastive import ContrastiveTrainer
from ldm.modules.encoders.openclip import text_features


class OpenCLIPTrainer(ContrastiveTrainer):
    """A CLIP of `open_clip`'s; where `layers` is a list, its image tower is Radford et al.'s residual network.

    Args:
        text_config, vision_config: settings of `open_clip`'s CLIPTextCfg and CLIPVisionCfg.
        embed_dim: width of the space that both towers meet in.

    The others are those of `ContrastiveTrainer`.
    """

    def __init__(self, tokenizer: str, text_config: Mapping[str, Any], vision_config: Mapping[str, Any],
                 embed_dim: int, **contrastive: Any) -> None:
        super().__init__(tokenizer, **contrastive)
        self.settings = {"embed_dim": embed_dim, "vision_cfg": dict(vision_config), "text_cfg": {
            "context_length": self.max_length, "vocab_size": len(self.tokenizer), **text_config}}
        self.clip = open_clip.CLIP(**self.settings).to(memory_format=torch.channels_last)  # convolutions gain by it

    def text_features(self, tokens: Tensor) -> Tensor:
        return text_features(self.clip, tokens)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(pixels)


