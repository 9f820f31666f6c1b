"""What the page is asked to generate, and what came of it, as values. Imports no torch."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.inference.settings import GenerationSettings


class Cancelled(Exception):
    """The user cancelled the generation."""


@dataclass(frozen=True)
class ImageRequest:
    """What a user asks for.

    Attributes:
        prompt, negative_prompt: texts.
        concepts: concept files.
        settings: how to generate; the bias is one for all concepts.
        seed: seed of the first image; None: random.
        count: number of images.
        biases: several biases make a strip: the same seed under each of them; empty: no strip.
        image: file of an image to start from, or None.
        mask: file of its mask, white where it is regenerated; None: everywhere.
        strength: how much of it changes; None: the default.
    """

    prompt: str
    negative_prompt: str = ""
    concepts: tuple[str, ...] = ()
    settings: GenerationSettings = GenerationSettings()
    seed: int | None = None
    count: int = 4
    biases: tuple[float, ...] = ()
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None


@dataclass(frozen=True)
class FinishedImage:
    """A generated image.

    Attributes:
        path: its PNG file, with its settings inside.
        title: for the gallery.
        seed: its seed.
        before: the image that it started from, cropped to its size, or None.
    """

    path: Path
    title: str
    seed: int
    before: Image.Image | None = None
