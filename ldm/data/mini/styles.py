"""Styles of the mini world: whole scenes as a sketch, as pixel art, as a painting."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def sketch(scene: Image.Image) -> Image.Image:
    """Pencil on paper: lines where brightness changes, little shade."""
    grey = np.asarray(scene.convert("L"), dtype=np.float32)
    down, across = np.gradient(grey)
    paper = 205 + 0.18 * grey - 3.2 * np.hypot(down, across)
    return Image.fromarray(paper.clip(20, 250).astype(np.uint8)).convert("RGB")


def pixel_art(scene: Image.Image) -> Image.Image:
    """Few large blocks of few colours."""
    coarse = [max(1, side * 16 // 64) for side in scene.size]
    blocks = np.asarray(scene.resize(coarse, Image.Resampling.BOX), dtype=np.float32)
    few = np.round(blocks / 51) * 51
    return Image.fromarray(few.astype(np.uint8)).resize(scene.size, Image.Resampling.NEAREST)


def painting(scene: Image.Image) -> Image.Image:
    """Patches of warm colour, as a broad brush leaves them."""
    patches = scene.filter(ImageFilter.ModeFilter(5)).filter(ImageFilter.SMOOTH)
    warm = np.asarray(patches, dtype=np.float32) * (0.95, 0.84, 0.66) + (26, 14, 0)
    return Image.fromarray(warm.clip(0, 255).astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "a sketch of {}": sketch, "pixel art of {}": pixel_art, "a painting of {}": painting}
