"""ImageNet (Deng et al. 2009) as latent diffusion's configs name it, from files that are there already.

The public code downloads and unpacks ImageNet; this does not. Its super-resolution pairs need image degradations, which
this package leaves out.
"""
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.images import read_image

DEFAULT_SIZE = 256
BROKEN_IMAGE = "n06596364_9591.JPEG"


class ImageNetBase(Dataset):
    """The images of `<root>/data/<synset>/*.JPEG`, with their classes in the order of the synsets' names.

    Items are dicts: `image` (size, size, 3) float32 in [-1, 1], `class_label`, `synsets`, `relpath` and `file_path_`,
    and `human_label` if the folder has the file `synset_human.txt` ("n01440764 tench" a line). Without
    `process_images` items are paths.

    Args:
        process_images: whether items have pixels.
        data_root: folder that holds the folder `NAME`; None: `$XDG_CACHE_HOME/autoencoders/data`.
        config: settings: `size` of the square crops (256), and `<class name>/random_crop`.

    Raises:
        UserError: there are no such images.
    """

    NAME: ClassVar[str] = ""
    random_crop_by_default: ClassVar[bool] = False

    def __init__(self, process_images: bool = True, data_root: str | Path | None = None,
                 config: Mapping[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        self.process_images = process_images
        self.root = _default_folder() / self.NAME if data_root is None else Path(data_root) / self.NAME
        self.size = self.config.get("size", DEFAULT_SIZE)
        self.random_crop = self.config.get(f"{type(self).__name__}/random_crop", self.random_crop_by_default)
        self.relpaths = self._list_images()
        self.abspaths = [os.path.join(self.root, "data", path) for path in self.relpaths]
        self.synsets = [path.split("/")[0] for path in self.relpaths]
        classes = {synset: index for index, synset in enumerate(sorted(set(self.synsets)))}
        self.class_labels = [classes[synset] for synset in self.synsets]
        self.human_labels = self._read_human_labels()

    def __len__(self) -> int:
        return len(self.relpaths)

    def __getitem__(self, i: int) -> Any:
        if not self.process_images:
            return self.abspaths[i]
        item = {"image": self._read_pixels(self.abspaths[i]), "relpath": self.relpaths[i], "synsets": self.synsets[i],
                "class_label": self.class_labels[i], "file_path_": self.abspaths[i]}
        return item | ({"human_label": self.human_labels[i]} if self.human_labels else {})

    def _list_images(self) -> list[str]:
        filelist, folder = self.root / "filelist.txt", self.root / "data"
        if filelist.is_file():
            paths = filelist.read_text().splitlines()
        else:
            paths = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.JPEG"))
        paths = [path for path in paths if path.rpartition("/")[2] != BROKEN_IMAGE]
        if not paths:
            raise UserError(f"{folder}: no ImageNet here; unpack it as <synset>/*.JPEG, or name its folder's parent by "
                            "the param data_root")
        return paths

    def _read_human_labels(self) -> list[str]:
        file = self.root / "synset_human.txt"
        if not file.is_file():
            return []
        labels = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip())
        return [labels[synset] for synset in self.synsets]

    def _read_pixels(self, path: str) -> np.ndarray:
        """Resize the shorter side to `size`, then crop a square: at random, or the center."""
        image = read_image(path)
        scale = self.size / min(image.size)
        image = image.resize(tuple(max(self.size, round(length * scale)) for length in image.size),
                             Image.Resampling.BILINEAR)
        excess = [length - self.size for length in image.size]
        left, top = (np.random.randint(extra + 1) if self.random_crop else extra // 2 for extra in excess)
        pixels = image.crop((left, top, left + self.size, top + self.size))
        return (np.asarray(pixels) / 127.5 - 1.0).astype(np.float32)


class ImageNetTrain(ImageNetBase):
    """The training images of ILSVRC 2012, cropped at random."""

    NAME = "ILSVRC2012_train"
    random_crop_by_default = True


class ImageNetValidation(ImageNetBase):
    """The validation images of ILSVRC 2012, sorted into one folder per synset."""

    NAME = "ILSVRC2012_validation"


class ImageNetSR(Dataset):
    """Pairs of images for super-resolution: left out. The params are those of the public class."""

    def __init__(self, size: int | None = None, degradation: str | None = None, downscale_f: int = 4,
                 min_crop_f: float = 0.5, max_crop_f: float = 1.0, random_crop: bool = True) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{type(self).__name__}: this package makes no super-resolution pairs; give a data set of your "
                        "own, such as ldm.data.folder.ImageFolder for a first stage")


class ImageNetSRTrain(ImageNetSR):
    """As `ImageNetSR`."""


class ImageNetSRValidation(ImageNetSR):
    """As `ImageNetSR`."""


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(cache) / "autoencoders" / "data"
