"""A text-prompted segmenter on a CLIP with a residual image tower, for the mini world.

The idea is CLIPSeg's (Lüddecke & Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022): a small decoder
reads several layers of a CLIP's image tower, and the text tells it what to segment. CLIPSeg's image tower is a
transformer, which needs millions of training images. A residual tower needs fewer. The decoder is then a pyramid from
the coarsest stage to the finest (Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation", CVPR 2022).
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.modules.encoders.openclip import text_features
from ldm.modules.encoders.vocabulary import load_packed

STAGES = ("layer1", "layer2", "layer3", "layer4")
SUBPIXELS = 2  # the finest level of the decoder has half the image's side


class ResidualSegmenter(nn.Module):
    """Compute how likely each pixel of an image shows what a text names.

    Args:
        embed_dim, vision_cfg, text_cfg: settings of the CLIP, in `open_clip`'s names; `vision_cfg["layers"]` is a list.
        widths: channels of the decoder's five levels, multiples of 32. The first level has half the image's side, the
            last one the size of the tower's last stage.
    """

    model_type = "residual-segmenter"

    def __init__(self, embed_dim: int, vision_cfg: Mapping[str, Any], text_cfg: Mapping[str, Any],
                 widths: Sequence[int] = (32, 64, 96, 128, 128)) -> None:
        super().__init__()
        self.config = {"embed_dim": embed_dim, "vision_cfg": dict(vision_cfg), "text_cfg": dict(text_cfg),
                       "widths": list(widths)}
        self.clip = open_clip.CLIP(embed_dim, dict(vision_cfg), dict(text_cfg))
        del self.clip.visual.attnpool  # it pools over positions, which a segmenter needs
        self.edges = nn.Conv2d(3, widths[0], 5, stride=SUBPIXELS, padding=2)
        stages = [getattr(self.clip.visual, name)[-1].bn3.num_features for name in STAGES]
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1)
                                     for channels, width in zip(stages, widths[1:], strict=True))
        self.blocks = nn.ModuleList(
            ResBlock(width, embed_dim, 0.0, use_scale_shift_norm=True) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(coarse, fine, 1)
                                  for fine, coarse in zip(widths[:-1], widths[1:], strict=True))
        self.out = nn.Conv2d(widths[0], SUBPIXELS**2, 1)

    @property
    def max_text_length(self) -> int:
        """Number of tokens that the model reads, start and end tokens included."""
        return self.config["text_cfg"]["context_length"]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed the tokens (B, N) of B texts, to (B, embed_dim)."""
        return text_features(self.clip, tokens)

    def forward(self, pixels: Tensor, text_embedding: Tensor) -> Tensor:
        """Compute logits.

        Args:
            pixels: images (B, 3, H, W), normalized as CLIP expects them; H and W multiples of 32.
            text_embedding: (B, embed_dim), what to look for in each image.

        Returns:
            (B, H, W)
        """
        # Run the tower and project the features of each stage to the decoder's widths.
        tower = self.clip.visual
        levels, features = [self.edges(pixels)], tower.stem(pixels)
        for name, lateral in zip(STAGES, self.lateral, strict=True):
            features = getattr(tower, name)(features)
            levels.append(lateral(features))

        # Decode from the coarsest level to the finest; each block is conditioned on the text.
        decoded = self.blocks[-1](levels[-1], text_embedding)
        for level, down, block in zip(levels[-2::-1], self.down[::-1], self.blocks[-2::-1], strict=True):
            upsampled = F.interpolate(down(decoded), size=level.shape[-2:])
            decoded = block(level + upsampled, text_embedding)
        return F.pixel_shuffle(self.out(decoded), SUBPIXELS)[:, 0]


def is_residual(folder: Path) -> bool:
    """Return whether a folder holds a `ResidualSegmenter`."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("model_type") == ResidualSegmenter.model_type


def load_residual_segmenter(folder: Path) -> ResidualSegmenter:
    """Load the segmenter of a folder, with packed word tables unpacked and parameters in float32.

    Raises:
        UserError: if the weights are cut off, or do not fit the model that config.json describes.
        ValueError, TypeError, KeyError: if config.json does not describe a segmenter.
    """
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("model_type")
    model = ResidualSegmenter(**settings)
    load_packed(model, folder, "config.json")
    return model
