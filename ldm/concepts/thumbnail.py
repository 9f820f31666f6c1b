"""A small image of a concept in the metadata of its file: a JPEG as a data URI of at most 8 KB.

The form is that of the metadata key `modelspec.thumbnail`, which model browsers show.
"""
from __future__ import annotations

import base64
import binascii
import io
import logging
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from ldm.common.files import load_metadata

log = logging.getLogger(__name__)

METADATA_KEY = "modelspec.thumbnail"
PREFIX = "data:image/jpeg;base64,"
MOST_BYTES = 8192  # of the data URI
SIDES, QUALITIES = (256, 192, 160, 128, 96, 64, 32), (85, 75, 65)  # tried in this order


def make_thumbnail(image: Image.Image) -> str:
    """Return an image as a JPEG data URI of at most 8 KB, the largest and then the best that fits."""
    image = image.convert("RGB")
    for side, quality in product(SIDES, QUALITIES):
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        uri = PREFIX + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) <= MOST_BYTES:
            return uri
    raise ValueError("an image of 32 pixels takes more than 8 KB")


def read_thumbnail(thumbnail: str) -> Image.Image:
    """Return the image of a thumbnail."""
    image = Image.open(io.BytesIO(jpeg_of(thumbnail)), formats=["JPEG"])
    image.load()
    return image.convert("RGB")


def stored_thumbnail(path: str | Path) -> str:
    """Return the thumbnail that a safetensors file holds, or "".

    Raises:
        UserError: it is no safetensors file.
    """
    return check_thumbnail(path, load_metadata(path).get(METADATA_KEY, ""))


def join_thumbnails(thumbnails: Sequence[str]) -> str:
    """Return one thumbnail with several side by side; "" for none."""
    images = [read_thumbnail(thumbnail) for thumbnail in thumbnails]
    if not images:
        return ""
    height = max(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
              for image in images]
    joined, left = Image.new("RGB", (sum(image.width for image in scaled), height)), 0
    for image in scaled:
        joined.paste(image, (left, 0))
        left += image.width
    return make_thumbnail(joined)


def check_thumbnail(path: str | Path, thumbnail: object) -> str:
    """Return what a file has as its thumbnail; log a warning and return "" if that is not one.

    A concept works without its thumbnail, and other programs write their own, so a bad one is no error.
    """
    if thumbnail == "" or (isinstance(thumbnail, str) and _is_thumbnail(thumbnail)):
        return thumbnail
    log.warning("warning: %s: its thumbnail is left out: it is no JPEG data URI of at most %d bytes", path, MOST_BYTES)
    return ""


def _is_thumbnail(text: str) -> bool:
    if len(text) > MOST_BYTES or not text.startswith(PREFIX):
        return False
    try:
        read_thumbnail(text)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # SyntaxError: Pillow on damaged headers
        return False
    return True


def jpeg_of(thumbnail: str) -> bytes:
    """Return the bytes of a thumbnail's JPEG file. Raises ValueError if they are damaged."""
    try:
        return base64.b64decode(thumbnail.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
