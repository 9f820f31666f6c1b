"""The options of training a concept encoder. Imports no torch, so that command lines answer at once."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EncoderOptions:
    """What to train an encoder for, and how.

    Attributes:
        config: the base model's config.
        out: folder of the encoder; images and logs are in it, too.
        checkpoint: the base model's weights; None: those that its config names.
        training: config of the training.
        images: number of images.
        steps, guidance_scale: how they are generated; None for the scale: the model's default.
        seed: of prompts, images and training.
        segmenter: folder or hub name of a CLIPSeg; None: the model's.
        tower: the CLIP that features come from; None: that of the training's config.
        strength: default strength of the encoder's concepts.
        batch_size: images generated at a time.
        max_steps: training steps; None: those of the training's config.
        device: such as "cuda:1"; None: the fastest there is.
        precision: "full", "autocast" or None, of generation.
    """

    config: str
    out: Path
    checkpoint: str | None = None
    training: str = "configs/encoder-sd-v1.yaml"
    images: int = 20_000
    steps: int = 12
    guidance_scale: float | None = None
    seed: int = 23
    segmenter: str | None = None
    tower: str | None = None
    strength: float = 1.0
    batch_size: int = 8
    max_steps: int | None = None
    device: str | None = None
    precision: str | None = None
