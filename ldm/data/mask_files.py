"""Masks that users paint: one image file per photo, white where the subject is."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.common.errors import UserError
from ldm.data.images import check_aspect_ratio, list_images, read_image, read_mask

logger = logging.getLogger(__name__)

THUMBNAIL = 32  # side at which a mask and its photo are compared
SAME_IMAGE = 6.0  # mean difference in levels of 255 up to which two thumbnails show the same image
BORDER_SHARE = 8  # the border of a mask is one part in eight of its side


def pair_masks(folder: str | Path, photos: Sequence[Path]) -> list[Path]:
    """Find the mask of every photo by its name.

    The mask of `cat.jpg` is called `cat.jpg` as well. If there is none, it is `cat.jpg.png` or `cat.png`, with any
    suffix and in any case.

    Raises:
        UserError: a photo has no mask, or several, or shares one with another photo; or the folder is that of the
            photos.
    """
    masks = list_images(folder)
    if photos and masks[0].parent.resolve() == photos[0].parent.resolve():
        raise UserError(f"{folder}: is the folder of the photos; give a folder of masks, white where the subject is")
    chosen = {photo: _masks_of(photo, masks) for photo in photos}
    missing = [photo.name for photo, found in chosen.items() if not found]
    if missing:
        raise UserError(f"{folder}: no mask for {', '.join(missing)}; add one of the same name, or drop mask_root")
    owners: dict[Path, Path] = {}
    for photo, found in chosen.items():
        if len(found) > 1:
            raise UserError(f"{folder}: {' and '.join(mask.name for mask in found)} could both be the mask of "
                            f"{photo.name}; keep one, or give it the photo's full name")
        other = owners.setdefault(found[0], photo)
        if other != photo:
            raise UserError(f"{folder}: {found[0].name} could be the mask of {other.name} and of {photo.name}; give "
                            "each mask its photo's full name")
    return [chosen[photo][0] for photo in photos]


def _masks_of(photo: Path, masks: Sequence[Path]) -> list[Path]:
    """Return the masks whose name fits the photo's best."""
    def is_same(mask: Path) -> bool:
        return mask.name == photo.name

    def has_full_name(mask: Path) -> bool:
        return photo.name.casefold() in (mask.name.casefold(), mask.stem.casefold())

    def has_same_stem(mask: Path) -> bool:
        return mask.stem.casefold() == photo.stem.casefold()

    for fits in (is_same, has_full_name, has_same_stem):
        found = [mask for mask in masks if fits(mask)]
        if found:
            return found
    return []


def read_painted_mask(path: Path, photo: Image.Image) -> Image.Image:
    """Read the mask of a photo and check that it is one.

    Returns:
        An image of mode "L" in which the subject is white.

    Raises:
        UserError: it cannot be read, does not have the photo's aspect ratio, is the photo itself, or has only one
            level.
    """
    mask = read_mask(path)
    check_aspect_ratio(path, mask.size, photo.size)
    lowest, highest = mask.getextrema()
    if highest == 0:
        raise UserError(f"{path}: black everywhere; paint the subject white")
    if lowest == highest == 255:
        logger.warning("%s: white everywhere, so the background counts as much as the subject", path)
    elif lowest == highest:
        raise UserError(f"{path}: has one gray level everywhere; paint the subject white and the rest black")
    elif _is_same_image(read_image(path), photo):
        raise UserError(f"{path}: is the photo itself; give a mask, white where the subject is and black elsewhere")
    return mask


def check_not_inverted(masks: Mapping[Path, Image.Image]) -> None:
    """Warn of masks that are white at the edges and black inside.

    Args:
        masks: the masks of all photos by their files.

    Raises:
        UserError: if most masks are like that.
    """
    inverted = [path for path, mask in masks.items() if _looks_inverted(mask)]
    if 2 * len(inverted) > len(masks):
        raise UserError(f"{inverted[0].parent}: most masks are white at the edges and black inside; invert them, white "
                        "is the subject")
    for path in inverted:
        logger.warning("%s: white at the edges and black inside; if the subject is black, invert the mask", path)


def _is_same_image(first: Image.Image, second: Image.Image) -> bool:
    thumbnails = [np.asarray(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL)), float) for image in (first, second)]
    return float(np.abs(thumbnails[0] - thumbnails[1]).mean()) <= SAME_IMAGE


def _looks_inverted(mask: Image.Image) -> bool:
    """Return whether a mask is white along most of its border, and less so inside."""
    if mask.getextrema()[0] == mask.getextrema()[1]:
        return False
    white = np.asarray(mask, float) >= mask.getextrema()[1] / 2
    height, width = max(1, white.shape[0] // BORDER_SHARE), max(1, white.shape[1] // BORDER_SHARE)
    inside = white[height:-height, width:-width]
    border = (white.sum() - inside.sum()) / max(1, white.size - inside.size)
    return border > 0.75 and inside.mean() < border
