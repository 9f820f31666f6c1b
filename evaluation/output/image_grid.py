"""Images in a grid, with a label for each row and each column, as a PNG file."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from evaluation.output.plots import DPI
from ldm.common.atomic_write import write_atomically

# Lengths are in inches.
TILE = 1.05  # an image's longer side
GAP = 0.04  # between images
LEFT_MARGIN, TOP_MARGIN, TITLE_HEIGHT = 1.7, 0.4, 0.3
LINE_LENGTH = 24  # letters in a line of a row's label
FONT_SIZE = 8  # points
TEXT_COLOR, NOTE_COLOR = "#222222", "#777777"


@dataclass(frozen=True)
class ColumnHeading:
    """The heading of a column.

    Attributes:
        label: the first line.
        note: a second line, smaller and gray.
        bold: whether the label is bold.
    """

    label: str
    note: str = ""
    bold: bool = False


def save_image_grid(path: str | Path, images: Sequence[Sequence[Image.Image]], row_labels: Sequence[str],
                    columns: Sequence[ColumnHeading], title: str) -> Path:
    """Write a grid of images.

    Args:
        images: row by row, all of one size.
        row_labels: one for each row; long ones are wrapped.
        columns: one for each column.

    Raises:
        UserError: the file cannot be written.
    """
    size = images[0][0].size
    tile_width, tile_height = (TILE * side / max(size) for side in size)
    width = LEFT_MARGIN + len(columns) * (tile_width + GAP)
    height = TITLE_HEIGHT + TOP_MARGIN + len(row_labels) * (tile_height + GAP)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.text(2 * GAP / width, 1 - TITLE_HEIGHT / 2 / height, title, fontsize=FONT_SIZE + 2, va="center",
                color=TEXT_COLOR)

    # Column headings: the label above the middle of the margin, the note below it.
    for column, heading in enumerate(columns):
        x = (LEFT_MARGIN + column * (tile_width + GAP) + tile_width / 2) / width
        y = 1 - (TITLE_HEIGHT + TOP_MARGIN / 2) / height
        figure.text(x, y, heading.label, fontsize=FONT_SIZE, ha="center", va="bottom", color=TEXT_COLOR,
                    weight="bold" if heading.bold else "normal")
        figure.text(x, y, heading.note, fontsize=FONT_SIZE - 1.5, ha="center", va="top", color=NOTE_COLOR)

    # Rows from the top down: the label at the left, then the images.
    for row, (label, row_images) in enumerate(zip(row_labels, images, strict=True)):
        bottom = height - TITLE_HEIGHT - TOP_MARGIN - (row + 1) * (tile_height + GAP) + GAP
        text = textwrap.fill(label, LINE_LENGTH, break_on_hyphens=False)
        figure.text((LEFT_MARGIN - 0.1) / width, (bottom + tile_height / 2) / height, text, fontsize=FONT_SIZE,
                    ha="right", va="center", linespacing=1.3, color=TEXT_COLOR)
        for column, image in enumerate(row_images):
            left = LEFT_MARGIN + column * (tile_width + GAP)
            axes = figure.add_axes((left / width, bottom / height, tile_width / width, tile_height / height))
            axes.imshow(image)
            axes.set_axis_off()
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
