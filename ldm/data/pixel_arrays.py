"""Image files as the LDM family's data sets read them: arrays (H, W, 3) in [-1, 1], resized and flipped at random."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.common.errors import UserError

INTERPOLATIONS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class PixelArrays:
    """Reads images, one at a time. Torch's global generator decides which are mirrored.

    Args:
        size: side of the square arrays, in pixels, to which the whole image is resized; None keeps its size.
        interpolation: "linear" (or "bilinear"), "bicubic" or "lanczos".
        flip_p: probability of a horizontal flip.
        center_crop: whether to crop the largest square in the center first.

    Raises:
        UserError: there is no such interpolation.
    """

    def __init__(self, size: int | None, interpolation: str = "bicubic", flip_p: float = 0.5,
                 center_crop: bool = True) -> None:
        if interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation: {interpolation!r} is unknown; give one of {', '.join(INTERPOLATIONS)}")
        self.size, self.flip_p, self.center_crop = size, flip_p, center_crop
        self.interpolation = INTERPOLATIONS[interpolation]

    def __call__(self, path: str | Path) -> np.ndarray:
        """Return the pixels of a file, (H, W, 3) float32 in [-1, 1].

        Raises:
            UserError: the file cannot be read as an image.
        """
        image = _open_rgb(path)
        if self.center_crop:
            image = _center_square(image)
        if self.size is not None:
            image = image.resize((self.size, self.size), resample=self.interpolation)
        if torch.rand(1) < self.flip_p:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return (np.asarray(image) / 127.5 - 1.0).astype(np.float32)


def _open_rgb(path: str | Path) -> Image.Image:
    """Return an image as its file stores it: neither turned upright nor laid on white, as the family reads it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as an image ({reason}); save it again as JPEG or PNG") from error


def _center_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # The family rounds both edges down, so an odd remainder is cut at the right and at the bottom.
    right, bottom = (image.width + side) // 2, (image.height + side) // 2
    return image.crop((left, top, right, bottom))
