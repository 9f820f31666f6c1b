"""The square of a photo that training sees: around the subject if a mask shows where it is, or in the center."""
from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

MARGIN = 0.15  # room on each side of the subject, relative to its longer side
ALMOST_ALL = 0.9  # a square of this share of the photo's shorter side is not worth resampling: all of it is used
INSIDE = 0.5  # level from which a pixel of a mask belongs to the subject


@dataclass(frozen=True)
class Square:
    """A square part of a photo, in pixels of the photo."""

    left: int
    top: int
    side: int

    def crop(self, image: Image.Image, size: int) -> Image.Image:
        """Return this part of an image, resized (Lanczos) to `size` x `size` pixels."""
        box = (self.left, self.top, self.left + self.side, self.top + self.side)
        return image.resize((size, size), Image.Resampling.LANCZOS, box=box)

    def corner(self, photo_size: tuple[int, int], size: int, mirrored: bool = False) -> tuple[int, int]:
        """Return (top, left) of this part in the photo as resized so that this part has a side of `size` pixels.

        This is the crop that SDXL reads. A photo is mirrored before it is cropped, as in public trainers: the left edge
        of the crop is then its right one.

        Args:
            photo_size: (width, height) of the photo.
            size: side of the resized part.
            mirrored: whether the photo is flipped horizontally.

        Source: Podell et al., "SDXL" (arXiv 2307.01952), Sec. 2.2.
        """
        scale = size / self.side
        left = photo_size[0] - self.left - self.side if mirrored else self.left
        return round(self.top * scale), round(left * scale)


def center_square(photo_size: tuple[int, int]) -> Square:
    """Return the largest square in the center of a photo of (width, height) pixels."""
    width, height = photo_size
    side = min(width, height)
    return Square((width - side) // 2, (height - side) // 2, side)


def subject_square(mask: Tensor, photo_size: tuple[int, int], min_side: int = 1) -> Square:
    """Return the smallest square inside a photo that shows the whole subject, with a margin around it.

    If the subject is longer than any square inside the photo, the square shows as much of it as possible.

    Args:
        mask: (h, w) in [0, 1], of the whole photo in any resolution; at least one pixel is 0.5 or more.
        photo_size: (width, height) of the photo.
        min_side: the square is not smaller than this, so that it is not enlarged beyond the photo's own sharpness,
            unless the photo is smaller itself.

    Raises:
        ValueError: no pixel of the mask belongs to the subject.
    """
    inside = mask >= INSIDE
    if not bool(inside.any()):
        raise ValueError("the mask shows no subject")
    # The subject's extent along both axes, in pixels of the photo
    columns, rows = inside.any(0), inside.any(1)
    horizontal, vertical = _extent(columns, photo_size[0]), _extent(rows, photo_size[1])
    longer = max(horizontal[1] - horizontal[0], vertical[1] - vertical[0])
    # A square of its size, inside the photo
    shorter_side = min(photo_size)
    side = min(shorter_side, max(round(longer * (1 + 2 * MARGIN)), min_side))
    if side >= ALMOST_ALL * shorter_side:
        side = shorter_side
    left = _position(horizontal, inside.sum(0), photo_size[0], side)
    top = _position(vertical, inside.sum(1), photo_size[1], side)
    return Square(left, top, side)


def _extent(occupied: Tensor, length: int) -> tuple[float, float]:
    """Return start and end of the occupied cells (n,) of an axis, in units in which all n cells are `length` long."""
    cells = occupied.nonzero()
    scale = length / len(occupied)
    return float(cells.min()) * scale, float(cells.max() + 1) * scale


def _position(extent: tuple[float, float], counts: Tensor, length: int, side: int) -> int:
    """Return where a window of `side` pixels starts on an axis of `length` pixels, so that it shows the subject best.

    Args:
        extent: start and end of the subject.
        counts: (n,) the subject's area at each of n cells of the axis.
        length: length of the axis.
        side: length of the window.
    """
    if extent[1] - extent[0] <= side:
        start = (extent[0] + extent[1] - side) / 2
    else:
        # No window shows all of it: take the one with the largest part of its area.
        cells = max(1, round(side * len(counts) / length))
        areas = counts.float().unfold(0, cells, 1).sum(1)
        start = float(areas.argmax()) * length / len(counts)
    return min(max(0, round(start)), length - side)
