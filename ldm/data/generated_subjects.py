"""Generated images of subjects with masks, in a folder: what the concept encoder of a large model is trained on.

One file per subject, `000012 - red and white striped - teddy bear.webp`: number, look ("plain" for none) and kind are
its name, and the mask is its transparency. So a user can look through the folder, and delete what is wrong.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.paths import user_path
from ldm.data.look_prompts import LookPrompt

FILE = re.compile(r"(\d{6,}) - (.+) - (.+)\.webp")
PLAIN = "plain"
QUALITY = 95
HELD_OUT = 20  # one kind in 20 is for validation


def save_subject(folder: str | Path, index: int, subject: LookPrompt, image: Image.Image, mask: Tensor) -> Path:
    """Write an image with the mask (H, W) in [0, 1] of its subject, as file `index` of a folder.

    Raises:
        FileNotWritten: (a UserError) the folder cannot be written to, or the disk is full.
    """
    alpha = Image.fromarray((255 * mask.clamp(0, 1)).round().byte().numpy(), "L")
    both = image.convert("RGB")
    both.putalpha(alpha.resize(both.size, Image.Resampling.BILINEAR))
    path = user_path(folder) / f"{index:06d} - {subject.look or PLAIN} - {subject.kind}.webp"
    return write_atomically(path, lambda temporary: both.save(temporary, "WEBP", quality=QUALITY, exact=True))


def find_subjects(folder: str | Path) -> dict[int, Path]:
    """Return the files of a folder by their numbers, in ascending order; none if there is no such folder."""
    found = user_path(folder)
    files = found.iterdir() if found.is_dir() else ()
    numbered = {int(match[1]): path for path in files if (match := FILE.fullmatch(path.name))}
    return dict(sorted(numbered.items()))


class GeneratedSubjects(Dataset[Mapping[str, Any]]):
    """The subjects of a folder, with items as those of `ldm.data.mini.composed_subjects.ComposedSubjects`.

    Args:
        folder: holds the files that `save_subject` writes.
        held_out: whether to return the subjects of the kinds for validation, one in 20, or those of all others.

    Raises:
        UserError: the folder holds subjects of fewer than two kinds.
    """

    def __init__(self, folder: str, held_out: bool = False) -> None:
        matches = [(path, FILE.fullmatch(path.name)) for path in find_subjects(folder).values()]
        kinds = sorted({match[3] for _, match in matches})
        if len(kinds) < 2:
            raise UserError(f"{folder}: holds subjects of {len(kinds)} kinds, and two or more are needed; make them "
                            "with scripts/train_encoder.py")
        wanted = set(kinds[::HELD_OUT]) if held_out else set(kinds) - set(kinds[::HELD_OUT])
        self.subjects = [(path, "" if match[2] == PLAIN else match[2], match[3]) for path, match in matches
                         if match[3] in wanted]
        self.with_pixels = True

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.with_pixels:
            return {"index": index}
        path, look, kind = self.subjects[index]
        image, mask = read_subject(path)
        return {"image": image, "mask": mask, "kind": kind, "look": look, "index": index}


def read_subject(path: Path) -> tuple[Tensor, Tensor]:
    """Return the image (3, H, W) in [-1, 1] of a file, and the mask (1, H, W) in [0, 1] of its subject.

    Raises:
        UserError: it is no image.
    """
    try:
        with Image.open(path) as opened:
            has_mask, pixels = opened.mode == "RGBA", np.array(opened.convert("RGBA"))
    except (OSError, ValueError):
        raise UserError(f"{path}: is damaged; delete it") from None
    if not has_mask:  # WebP drops a transparency of 255 everywhere
        pixels[..., 3] = 255
    values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return 2 * values[:3] - 1, values[3:]
