"""Contact sheets: many images in one PNG file, row by row, with titles."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm.common.atomic_write import write_atomically

FONT_SIZE = 13
LINE_HEIGHT = FONT_SIZE + 3
MARGIN = 6
READABLE_SIDE = 128  # smaller images are enlarged
MAX_ENLARGEMENT = 4
FAST_COMPRESSION = 1  # zlib level: a sheet of photos takes a sixth of the time and a fifth more space than by default

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def make_grid(images: Sequence[Image.Image], columns: int, titles: Sequence[str] | None = None) -> Image.Image:
    """Lay images out row by row, with a title above each image.

    If the longest side of all images is below 128 pixels, all are enlarged by the same factor, at most 4.

    Args:
        images: at least one.
        columns: number of images in a row.
        titles: one per image.

    Raises:
        ValueError: no images, no columns, or not one title per image.
    """
    if not images or columns < 1 or (titles is not None and len(titles) != len(images)):
        raise ValueError(f"no contact sheet of {len(images)} images in {columns} columns with titles {titles}")
    factor = _enlargement_factor(max(max(image.size) for image in images))
    enlarged = [image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
                for image in images]
    return _lay_out(enlarged, min(columns, len(images)), titles or [""] * len(images))


def save_grid(
    images: Sequence[Image.Image], path: str | Path, columns: int, titles: Sequence[str] | None = None
) -> Path:
    """Write the sheet that `make_grid` lays out as a PNG file, and return its path."""
    sheet = make_grid(images, columns, titles)
    return write_atomically(path, lambda temporary: save_quickly(sheet, temporary))


def save_quickly(sheet: Image.Image, path: Path) -> None:
    """Write a large image as PNG in little time."""
    sheet.save(path, format="PNG", compress_level=FAST_COMPRESSION)


def _enlargement_factor(side: int) -> int:
    return 1 if side >= READABLE_SIDE else min(MAX_ENLARGEMENT, math.ceil(READABLE_SIDE / side))


def _lay_out(images: Sequence[Image.Image], columns: int, titles: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default(FONT_SIZE)
    width = max(image.width for image in images)
    title_lines = [_wrap_text(title, width, font) for title in titles]

    # Measure the rows: each is as high as its longest title and its highest image.
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    title_heights = [LINE_HEIGHT * max(len(title_lines[index]) for index in row) for row in rows]
    image_heights = [max(images[index].height for index in row) for row in rows]
    height = sum(title_heights) + sum(image_heights) + MARGIN * (len(rows) + 1)

    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, height), "white")
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, title_height, image_height in zip(rows, title_heights, image_heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            for line, text in enumerate(title_lines[index]):
                pen.text((left, top + line * LINE_HEIGHT), text, fill="black", font=font)
            sheet.paste(images[index], (left, top + title_height))
        top += title_height + image_height + MARGIN
    return sheet


def _wrap_text(text: str, width: int, font: Font) -> list[str]:
    """Split `text` into lines of at most `width` pixels. A word that is too long for a line is broken."""
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
