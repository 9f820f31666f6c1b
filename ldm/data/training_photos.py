"""The photos of a concept before they are cropped: pixels, mask, and what their caption adds."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.common.errors import UserError
from ldm.data.crops import Square, center_square, subject_square
from ldm.data.decoding import open_image
from ldm.data.images import CAPTION_SUFFIX, read_folder, read_mask
from ldm.data.mask_files import check_not_inverted, pair_masks, read_painted_mask

KEPT_RESOLUTION = 3  # photos are kept at up to this many times the training size, so that a crop stays sharp
HALF_OPAQUE = 128
FINE_CELLS = 16  # side of the grid on which photos are compared
SAME_SHOT = 0.98  # correlation of the colors on that grid from which two files show the same shot
PLAIN = 2.0  # standard deviation in levels below which an image has nothing to compare but its color


@dataclass
class TrainingPhoto:
    """A photo, reduced to what training can use of it.

    Attributes:
        path: its file.
        image: RGB, of the photo's proportions.
        mask: mode "L" or "F" (in [0, 1]), of the photo's proportions, white where the subject is; None: unknown.
        mask_source: where the mask is from: "painted", "transparency" or "segmenter"; "" without one.
        note: what else the photo shows, from a text file beside it; "" without one.
        original_size: (width, height) of the photo in its file, turned upright.
    """

    path: Path
    image: Image.Image
    mask: Image.Image | None = None
    mask_source: str = ""
    note: str = ""
    original_size: tuple[int, int] = (0, 0)

    def square(self, around_subject: bool, min_side: int) -> Square:
        """Return the part of the photo to train on: around the subject if its mask is known, else in the center."""
        if not around_subject or self.mask is None:
            return center_square(self.image.size)
        levels = torch.from_numpy(np.array(self.mask, np.float32))
        return subject_square(levels / levels.max(), self.image.size, min_side)

    def cropped_mask(self, square: Square, size: int) -> Tensor | None:
        """Return the mask (1, size, size) of a part of the photo, with a maximum of 1; None if there is none.

        It is all zeros if the subject is not in this part.
        """
        if self.mask is None:
            return None
        scale_x, scale_y = self.mask.width / self.image.width, self.mask.height / self.image.height
        box = (square.left * scale_x, square.top * scale_y,
               (square.left + square.side) * scale_x, (square.top + square.side) * scale_y)
        method = Image.Resampling.BILINEAR if self.mask.mode == "F" else Image.Resampling.LANCZOS
        levels = torch.from_numpy(np.array(self.mask.resize((size, size), method, box=box), np.float32))
        return (levels / levels.max().clamp(min=1e-6)).clamp(0, 1)[None]


def read_training_photos(data_root: str | Path, size: int, mask_root: str | Path | None = None,
                         left_out: dict[str, str] | None = None) -> list[TrainingPhoto]:
    """Read the photos of a folder, with painted masks or those that transparent photos bring.

    Args:
        data_root: the folder.
        size: side of the square images that training sees.
        mask_root: folder of painted masks; None: photos with a transparent background bring their own.
        left_out: takes the names of files that are not used, and why. None: a warning names them.

    Raises:
        UserError: there is no usable photo, or a mask is missing or unusable.
    """
    photos = []
    for path, image in read_folder(data_root, left_out):
        photo = TrainingPhoto(path, image, note=_read_note(path), original_size=image.size)
        if mask_root is None:
            photo.mask = _opacity(path)
            photo.mask_source = "" if photo.mask is None else "transparency"
        photos.append(photo)
    if mask_root is not None:
        paths = pair_masks(mask_root, [photo.path for photo in photos])
        for photo, path in zip(photos, paths, strict=True):
            photo.mask, photo.mask_source = read_painted_mask(path, photo.image), "painted"
        check_not_inverted({path: photo.mask for photo, path in zip(photos, paths, strict=True)})
    for photo in photos:
        photo.image = _reduced(photo.image, KEPT_RESOLUTION * size)
    return photos


def same_shots(photos: Sequence[TrainingPhoto]) -> list[tuple[Path, Path]]:
    """Return pairs of files that show the same shot: copies, also resized, recompressed or a little edited."""
    thumbnails = [_thumbnail(photo.image) for photo in photos]
    pairs = []
    for second in range(len(photos)):
        for first in range(second):
            if _show_the_same(thumbnails[first], thumbnails[second]):
                pairs.append((photos[first].path, photos[second].path))
                break
    return pairs


def _thumbnail(image: Image.Image) -> np.ndarray:
    """Return the colors of a coarse grid, (FINE_CELLS, FINE_CELLS, 3) in levels of 0 to 255."""
    return np.asarray(image.convert("RGB").resize((FINE_CELLS, FINE_CELLS), Image.Resampling.BOX), float)


def _show_the_same(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two thumbnails differ in brightness and contrast at most."""
    first, second = first - first.mean(), second - second.mean()
    if min(first.std(), second.std()) < PLAIN:
        return bool(np.abs(first - second).mean() < PLAIN)
    return bool((first * second).mean() / (first.std() * second.std()) > SAME_SHOT)


def _opacity(path: Path) -> Image.Image | None:
    """Return the opacity of a photo whose background is transparent (a cut-out), mode "L"; None for others."""
    with open_image(path) as opened:
        if not opened.has_transparency_data:
            return None
        lowest, highest = opened.convert("RGBA").getchannel("A").getextrema()
    return read_mask(path) if lowest < HALF_OPAQUE <= highest else None


def _read_note(path: Path) -> str:
    """Return the text beside a photo, `cat.txt` or `cat.jpg.txt` for `cat.jpg`, in one line; "" if there is none."""
    beside = (path.with_suffix(CAPTION_SUFFIX), path.with_name(path.name + CAPTION_SUFFIX))
    file = next((candidate for candidate in beside if candidate.is_file()), None)
    if file is None:
        return ""
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}); save it in UTF-8") from None


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """Reduce an image whose shorter side is longer than `side` to that."""
    if min(image.size) <= side:
        return image
    scale = side / min(image.size)
    return image.resize([round(length * scale) for length in image.size], Image.Resampling.LANCZOS, reducing_gap=3)
