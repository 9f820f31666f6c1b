"""A folder of images to train first stages and unconditional models on, of any size."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.images import crop_square, list_images, read_image, to_tensor

log = logging.getLogger(__name__)

VALIDATION_EVERY = 20  # one image in 20, in the order of their names, is for validation
MIN_CROP = 0.5  # of the image's shorter side


class ImageFolder(Dataset):
    """Square crops of a folder's images, read one at a time.

    Items are dicts: {"image": (3, size, size) float32 in [-1, 1]}. If a file cannot be read, its item is the next
    image that can be, and a warning names the file.

    Args:
        data_root: folder of images.
        size: side of the square crops, in pixels.
        split: "validation" is the first image and every twentieth after it, "training" is all the others.
        random_crop: crop a square at a random position, its side between half and all of the image's shorter side,
            instead of the largest one in the center. Torch's global generator draws it.

    Raises:
        UserError: there is no such folder, or it has no image for this split.
    """

    renamed_params: ClassVar[dict[str, str]] = {"part": "split"}

    def __init__(self, data_root: str | Path, size: int = 256,
                 split: Literal["all", "training", "validation"] = "all", random_crop: bool = False) -> None:
        if size < 1:
            raise UserError(f"size: {size} pixels make no image; give the size that the model works at, e.g. 256")
        paths = list_images(data_root)
        self.paths = {"all": paths, "validation": paths[::VALIDATION_EVERY],
                      "training": [path for index, path in enumerate(paths) if index % VALIDATION_EVERY]}[split]
        if not self.paths:
            raise UserError(f"{data_root}: one image cannot be split into training and validation; add more")
        self.size, self.random_crop = size, random_crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Raise UserError if none of the images can be read."""
        for offset in range(len(self.paths)):
            path = self.paths[(index + offset) % len(self.paths)]
            try:
                image = read_image(path)
            except UserError as error:
                log.warning("left out %s", error)
                continue
            return {"image": to_tensor(self._crop(image))}
        raise UserError(f"{self.paths[index].parent}: none of its images can be read; choose another folder")

    def _crop(self, image: Image.Image) -> Image.Image:
        if not self.random_crop:
            return crop_square(image, self.size)
        share, *offsets = torch.rand(3).tolist()
        side = min(image.size) * (MIN_CROP + (1 - MIN_CROP) * share)
        left, top = (offset * (length - side) for offset, length in zip(offsets, image.size, strict=True))
        return image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
