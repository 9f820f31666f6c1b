"""Pictures as people have them: read safely, turned upright, cropped to squares, and laid out on contact sheets."""
from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.common.errors import UserError
from ldm.common.files import write_atomically

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".tif", ".tiff")  # pictures, but none that we read
SMALLEST_SIDE = 16
ASPECT_TOLERANCE = 0.02  # a mask drawn at another resolution may be off by a rounded pixel
MOST_PIXELS = 80_000_000  # below Pillow's own warning; decoded, such a photo takes a quarter of a gigabyte

ORIENTATION_TAG = 0x0112  # EXIF 2.3, table 4: how the camera was held
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

FONT_SIZE = 13
MARGIN = 6
READABLE_SIDE = 128
OPAQUE = 255
QUICKLY = 1  # zlib's level: a sheet of photos takes a sixth of the time and a fifth more room than at PNG's usual one


def read_image(path: str | Path) -> Image.Image:
    """The picture as upright RGB with 8 bits a channel; what is transparent in it becomes white.

    Raises:
        UserError: the file is missing, no picture, cut off, smaller than 16 pixels on a side or far too large.
    """
    return _as_rgb(_decoded(Path(path)))


def read_mask(path: str | Path) -> Image.Image:
    """A picture of what matters, as upright mode "L": white counts in full, black not at all.

    Of a picture with anything transparent in it (a cut-out) the opacity is taken instead of the colours.

    Raises:
        UserError: as `read_image`.
    """
    image = _decoded(Path(path))
    opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if opacity is None or opacity.getextrema()[0] == OPAQUE:  # many programs save a channel of it that says nothing
        return _as_rgb(image).convert("L")
    return opacity


def refuse_other_proportions(path: str | Path, mask_size: tuple[int, int], photo_size: tuple[int, int]) -> None:
    """Raises a UserError where the mask at `path` cannot have been drawn over all of a photo of (width, height)."""
    (width, height), (across, down) = mask_size, photo_size
    if abs(width * down / (height * across) - 1) > ASPECT_TOLERANCE:
        raise UserError(f"{path}: {width}x{height} does not fit its photo, {across}x{down}; draw it over all of it")


def list_images(folder: str | Path) -> list[Path]:
    """The picture files directly in `folder`, sorted by name; hidden files and subfolders are left out.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the pictures")
    try:
        shown = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); allow it, or copy the pictures elsewhere"
                        ) from None
    unread = [path.name for path in shown if path.suffix.lower() in OTHER_SUFFIXES]
    if unread:
        logger.warning("%s: left out %s; save them as JPEG or PNG to use them", folder, ", ".join(unread))
    paths = [path for path in shown if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(f"{folder}: no pictures in this folder; put {', '.join(SUFFIXES)} files there")
    return paths


def read_folder(folder: str | Path) -> Iterator[tuple[Path, Image.Image]]:
    """Yields each usable picture of `folder` as `read_image` gives it, one in memory at a time.

    A file that cannot be used costs one warning line that names it.

    Raises:
        UserError: as `list_images`, or none of the files can be used.
    """
    refused: list[UserError] = []
    usable = 0
    for path in list_images(folder):
        try:
            image = read_image(path)
        except UserError as error:
            refused.append(error)
            continue
        usable += 1
        yield path, image
    if not usable:
        more = f"; {len(refused) - 1} more likewise" if len(refused) > 1 else ""
        raise UserError(f"{folder}: none of its pictures can be used: {refused[0]}{more}")
    for error in refused:
        logger.warning("left out %s", error)


def load_folder(folder: str | Path) -> list[tuple[Path, Image.Image]]:
    """All of `read_folder` at once; raises as it does."""
    return list(read_folder(folder))


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of `image`, resampled (Lanczos) to `size` pixels on a side."""
    return cut_to(image, size, size)


def cut_to(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of `image` in the proportions of width x height, resampled (Lanczos) to this size."""
    across, down = part_in_proportion(image.size, width, height)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))


def part_in_proportion(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) of the largest rectangle with the proportions of width x height in one of `size`."""
    across, down = size
    if across * height < down * width:
        return across, max(1, round(across * height / width))
    return max(1, round(down * width / height)), down


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture to a float32 tensor (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.movedim(-1, 0).contiguous().float().div(127.5).sub(1)


def from_tensor(pixels: torch.Tensor) -> Image.Image:
    """The inverse of `to_tensor`: (3, H, W), what exceeds [-1, 1] cut off, to an RGB picture."""
    levels = pixels.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(levels.movedim(0, -1).contiguous().numpy())


def save_grid(
    images: Sequence[Image.Image], path: str | Path, columns: int, titles: Sequence[str] | None = None
) -> Path:
    """Writes a PNG contact sheet, row by row, each picture under its title; returns the path.

    Pictures whose longer side is below 128 pixels are enlarged up to four times, all by the same factor.

    Raises:
        ValueError: no pictures, no columns, or not one title per picture.
    """
    if not images or columns < 1 or (titles is not None and len(titles) != len(images)):
        raise ValueError(f"{len(images)} pictures, {columns} columns, titles {titles}: no sheet can be made of these")
    factor = _enlargement(max(max(image.size) for image in images))
    shown = [image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
             for image in images]
    sheet = _sheet(shown, min(columns, len(images)), titles or [""] * len(images))
    return write_atomically(path, lambda aside: sheet.save(aside, format="PNG", compress_level=QUICKLY))


def _decoded(path: Path) -> Image.Image:
    """The upright picture, fully read, in the mode of its file or, of those with 16 bits, as "L"."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _refuse_size says it better
            opened = Image.open(path)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: far too many pixels; save it smaller") from None
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise _unreadable(path, error) from None
    with opened:
        _refuse_size(path, *opened.size)
        try:
            opened.load()
        except Exception as error:  # as above
            raise _unreadable(path, error) from None
        return _eight_bits(_upright(opened))


def _unreadable(path: Path, error: Exception) -> UserError:
    detail = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
    return UserError(f"{path}: cannot be read ({detail}); copy or save it again as JPEG or PNG")


def _refuse_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(f"{path}: {width}x{height} is too small; use one of at least {SMALLEST_SIDE} pixels a side")
    if width * height > MOST_PIXELS:
        raise UserError(f"{path}: {width}x{height} is too large; save it with under {MOST_PIXELS // 10**6} megapixels")


def _upright(image: Image.Image) -> Image.Image:
    """Undoes the rotation that a camera noted in its EXIF block; a damaged block counts as none."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception as error:  # the block is free-form bytes, and its parser raises many things
        logger.debug("EXIF of %s ignored: %s", getattr(image, "filename", "a picture"), error)
        orientation = 1
    turn = UPRIGHT.get(orientation)
    return image.copy() if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    grey = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255)  # Pillow's conversion cuts off, not scales
    return Image.fromarray(grey.round().astype(np.uint8))


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    cut_out = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), cut_out).convert("RGB")


def _enlargement(side: int) -> int:
    return 1 if side >= READABLE_SIDE else min(4, math.ceil(READABLE_SIDE / side))


def _sheet(images: Sequence[Image.Image], columns: int, titles: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default(FONT_SIZE)
    width = max(image.width for image in images)
    wrapped = [_wrapped(title, width, font) for title in titles]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    line = FONT_SIZE + 3
    bands = [line * max(len(wrapped[i]) for i in row) for row in rows]
    heights = [max(images[i].height for i in row) for row in rows]
    total = sum(bands) + sum(heights) + MARGIN * (len(rows) + 1)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, total), "white")
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for row, band, height in zip(rows, bands, heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            for number, text in enumerate(wrapped[i]):
                pen.text((left, top + number * line), text, fill="black", font=font)
            sheet.paste(images[i], (left, top + band))
        top += band + height + MARGIN
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of `text` that fit into `width` pixels; a word that is too long for a line is broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
