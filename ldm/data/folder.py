"""A folder of pictures to train first stages and base models on, however many there are."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.images import list_images, read_image, square, to_tensor

log = logging.getLogger(__name__)

EVERY = 20  # of so many pictures, in the order of their names, one is for validation
SMALLEST_CROP = 0.5  # of a picture's shorter side


class PictureFolder(Dataset):
    """Pictures of a folder, read when they are asked for: {"image": (3, size, size) float32 in [-1, 1]}.

    Args:
        data_root: folder of pictures; one that cannot be read gives way to the next, with a warning.
        size: side of the square pictures, in pixels.
        part: "training" leaves out the pictures that "validation" has: the first, and every twentieth after it.
        random_crop: a square anywhere in the picture, of half its shorter side or more, instead of the largest in the
            middle; drawn from torch's global generator.

    Raises:
        UserError: there is no such folder, or no picture for this part.
    """

    def __init__(self, data_root: str | Path, size: int = 256, part: Literal["all", "training", "validation"] = "all",
                 random_crop: bool = False) -> None:
        if size < 1:
            raise UserError(f"size: {size} pixels is no picture; give the size that the model works at, e.g. 256")
        paths = list_images(data_root)
        self.paths = {"all": paths, "validation": paths[::EVERY],
                      "training": [path for place, path in enumerate(paths) if place % EVERY]}[part]
        if not self.paths:
            raise UserError(f"{data_root}: a single picture cannot be parted into training and validation; add more")
        self.size, self.random_crop = size, random_crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Raises a UserError where none of the pictures can be read."""
        for path in (*self.paths[index:], *self.paths[:index]):
            try:
                image = read_image(path)
            except UserError as error:
                log.warning("left out %s", error)
                continue
            return {"image": to_tensor(self._cropped(image))}
        raise UserError(f"{self.paths[index].parent}: none of its pictures can be read; choose another folder")

    def _cropped(self, image: Image.Image) -> Image.Image:
        if not self.random_crop:
            return square(image, self.size)
        share, *places = torch.rand(3).tolist()
        side = min(image.size) * (SMALLEST_CROP + (1 - SMALLEST_CROP) * share)
        left, top = (place * (length - side) for place, length in zip(places, image.size, strict=True))
        return image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
