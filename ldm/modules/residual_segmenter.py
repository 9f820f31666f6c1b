"""A segmenter asked by text, on a CLIP with a residual image tower.

The idea is CLIPSeg's (Lüddecke & Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022): a light decoder
reads several layers of a CLIP's image tower, and the text says what to look for. Their image tower is a transformer,
which has to see millions of pictures before it tells things apart; with a residual tower the decoder is a pyramid, from
the coarsest stage to the finest, as in Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation", CVPR 2022.
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
SUBPIXELS = 2  # the finest level of the decoder has half the picture's side


class ResidualSegmenter(nn.Module):
    """How likely each pixel of a picture shows what a text names.

    Args:
        embed_dim, vision_cfg, text_cfg: of the CLIP, as `open_clip` names them; its `layers` are a list.
        widths: channels of the decoder's five levels, from the finest at half the picture's side to that of the tower's
            last stage; multiples of 32.
    """

    model_type = "residual-segmenter"

    def __init__(self, embed_dim: int, vision_cfg: Mapping[str, Any], text_cfg: Mapping[str, Any],
                 widths: Sequence[int] = (32, 64, 96, 128, 128)) -> None:
        super().__init__()
        self.config = {"embed_dim": embed_dim, "vision_cfg": dict(vision_cfg), "text_cfg": dict(text_cfg),
                       "widths": list(widths)}
        self.clip = open_clip.CLIP(embed_dim, dict(vision_cfg), dict(text_cfg))
        del self.clip.visual.attnpool  # it sums up the picture; where things are is gone after it
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
    def longest_text(self) -> int:
        """In tokens, the marks for start and end included."""
        return self.config["text_cfg"]["context_length"]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, embed_dim) for the word-piece numbers of B texts, (B, N)."""
        return text_features(self.clip, tokens)

    def forward(self, pixels: Tensor, meaning: Tensor) -> Tensor:
        """Logits (B, H, W) for pictures (B, 3, H, W) as CLIP wants them, sides multiples of 32, and a text for each,
        (B, embed_dim)."""
        tower = self.clip.visual
        levels, features = [self.edges(pixels)], tower.stem(pixels)
        for name, lateral in zip(STAGES, self.lateral, strict=True):
            features = getattr(tower, name)(features)
            levels.append(lateral(features))
        found = self.blocks[-1](levels[-1], meaning)
        for level, down, block in zip(levels[-2::-1], self.down[::-1], self.blocks[-2::-1], strict=True):
            found = block(level + F.interpolate(down(found), size=level.shape[-2:]), meaning)
        return F.pixel_shuffle(self.out(found), SUBPIXELS)[:, 0]


def is_residual(folder: Path) -> bool:
    """Whether there is a `ResidualSegmenter` in a folder."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text()).get("model_type") == ResidualSegmenter.model_type


def load_residual_segmenter(folder: Path) -> ResidualSegmenter:
    """The one in a folder, packed word tables unpacked; parameters in float32.

    Raises:
        UserError: its weights are cut off, or are not those of the model that its settings describe.
        ValueError, TypeError, KeyError: its settings are not those of a segmenter.
    """
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("model_type")
    model = ResidualSegmenter(**settings)
    load_packed(model, folder, "config.json")
    return model
