"""LSUN (Yu et al. 2015) as latent diffusion's configs name it: a text file lists the images of a folder."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.pixel_arrays import PixelArrays

FOLDER = Path("data/lsun")  # relative to the working directory, as in the public scripts


class LSUNBase(Dataset):
    """The images that a text file lists, one path a line, as center squares.

    Items are dicts: `image` (size, size, 3) float32 in [-1, 1], `relative_file_path_` and `file_path_`.

    Args:
        txt_file: the list of images.
        data_root: folder that its paths are relative to.
        size: side of the images, in pixels; None keeps that of the squares.
        interpolation: "linear", "bilinear", "bicubic" or "lanczos".
        flip_p: probability of a horizontal flip, decided by torch's global generator.

    Raises:
        UserError: the list cannot be read.
    """

    def __init__(self, txt_file: str | Path, data_root: str | Path, size: int | None = None,
                 interpolation: str = "bicubic", flip_p: float = 0.5) -> None:
        self.data_paths, self.data_root, self.size = txt_file, data_root, size
        try:
            self.image_paths = Path(txt_file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{txt_file}: cannot be read ({error.strerror}); it must list the images of {data_root}"
                            ) from None
        self.labels = {"relative_file_path_": list(self.image_paths),
                       "file_path_": [os.path.join(data_root, path) for path in self.image_paths]}
        self.read_pixels = PixelArrays(size, interpolation, flip_p, center_crop=True)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        names = {key: values[i] for key, values in self.labels.items()}
        return {**names, "image": self.read_pixels(names["file_path_"])}


class LSUNChurchesTrain(LSUNBase):
    """Churches for training, from data/lsun in the working directory."""

    def __init__(self, size: int | None = None, interpolation: str = "bicubic", flip_p: float = 0.5) -> None:
        super().__init__(FOLDER / "church_outdoor_train.txt", FOLDER / "churches", size, interpolation, flip_p)


class LSUNChurchesValidation(LSUNBase):
    """Churches for validation, from data/lsun in the working directory; not flipped."""

    def __init__(self, flip_p: float = 0.0, size: int | None = None, interpolation: str = "bicubic") -> None:
        super().__init__(FOLDER / "church_outdoor_val.txt", FOLDER / "churches", size, interpolation, flip_p)


class LSUNBedroomsTrain(LSUNBase):
    """Bedrooms for training, from data/lsun in the working directory."""

    def __init__(self, size: int | None = None, interpolation: str = "bicubic", flip_p: float = 0.5) -> None:
        super().__init__(FOLDER / "bedrooms_train.txt", FOLDER / "bedrooms", size, interpolation, flip_p)


class LSUNBedroomsValidation(LSUNBase):
    """Bedrooms for validation, from data/lsun in the working directory; not flipped."""

    def __init__(self, flip_p: float = 0.0, size: int | None = None, interpolation: str = "bicubic") -> None:
        super().__init__(FOLDER / "bedrooms_val.txt", FOLDER / "bedrooms", size, interpolation, flip_p)


class LSUNCatsTrain(LSUNBase):
    """Cats for training, from data/lsun in the working directory."""

    def __init__(self, size: int | None = None, interpolation: str = "bicubic", flip_p: float = 0.5) -> None:
        super().__init__(FOLDER / "cat_train.txt", FOLDER / "cats", size, interpolation, flip_p)


class LSUNCatsValidation(LSUNBase):
    """Cats for validation, from data/lsun in the working directory; not flipped."""

    def __init__(self, flip_p: float = 0.0, size: int | None = None, interpolation: str = "bicubic") -> None:
        super().__init__(FOLDER / "cat_val.txt", FOLDER / "cats", size, interpolation, flip_p)
