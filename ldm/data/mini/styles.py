"""Styles of the mini world: whole scenes as a sketch, as pixel art, as a painting."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def sketch(scene: Image.Image) -> Image.Image:
    """Draw gray lines on paper where the brightness changes, with little shading."""
    gray = np.asarray(scene.convert("L"), dtype=np.float32)
    down, across = np.gradient(gray)
    paper = 205 + 0.18 * gray - 3.2 * np.hypot(down, across)
    return Image.fromarray(paper.clip(20, 250).astype(np.uint8)).convert("RGB")


def pixel_art(scene: Image.Image) -> Image.Image:
    """Reduce the scene to 16 x 16 blocks of few colors."""
    coarse_size = [max(1, side * 16 // 64) for side in scene.size]
    blocks = np.asarray(scene.resize(coarse_size, Image.Resampling.BOX), dtype=np.float32)
    few_colors = np.round(blocks / 51) * 51
    return Image.fromarray(few_colors.astype(np.uint8)).resize(scene.size, Image.Resampling.NEAREST)


def painting(scene: Image.Image) -> Image.Image:
    """Merge the scene into patches of warm colors, as from a broad brush."""
    patches = scene.filter(ImageFilter.ModeFilter(5)).filter(ImageFilter.SMOOTH)
    warm = np.asarray(patches, dtype=np.float32) * (0.95, 0.84, 0.66) + (26, 14, 0)
    return Image.fromarray(warm.clip(0, 255).astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "a sketch of {}": sketch, "pixel art of {}": pixel_art, "a painting of {}": painting}
"""Caption template -> style."""
