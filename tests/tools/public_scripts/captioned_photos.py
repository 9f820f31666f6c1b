"""A data set of a user: photos with a caption, in arrays as the LDM family's data sets give them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from torch.utils.data import Dataset


class CaptionedPhotos(Dataset):
    """The PNG files of a folder; their names are their captions."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(Path(folder).glob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = numpy.asarray(Image.open(self.paths[index]).convert("RGB").resize((64, 64)), dtype=numpy.float32)
        return {"image": pixels / 127.5 - 1, "caption": f"a photo of number {self.paths[index].stem}"}
