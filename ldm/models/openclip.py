"""CLIPs as `open_clip` builds them (Ilharco et al., OpenCLIP): trained here, and read from folders in its layout."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from ldm.models.clip import ContrastiveTrainer
from ldm.modules.encoders.openclip import text_features
from ldm.modules.encoders.vocabulary import load_packed

SETTINGS = "open_clip_config.json"


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


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Nothing is logged while this lasts: what goes wrong is raised as well.

    `open_clip` tells on the root logger of every step, and warns of a model without weights before it can be given any.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def load_openclip(folder: str | Path) -> open_clip.CLIP:
    """The CLIP in a folder as `open_clip` keeps it, packed word tables unpacked; parameters in float32.

    Raises:
        UserError: its weights are cut off, or are not those of the model that its settings describe.
        ValueError, OSError: what `open_clip` raises for settings that it cannot read.
    """
    with hushed():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    load_packed(model, folder, SETTINGS)
    return model
