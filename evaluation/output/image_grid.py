"""Pictures in a grid with a label for each row and each column, as PNG."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Canvas
from PIL import Image

from evaluation.output.plots import DOTS_PER_INCH
from ldm.common.files import write_atomically

TILE = 1.05  # inches of a picture's longer side
GAP = 0.04  # inches between pictures
LEFT, TOP, TITLE = 1.7, 0.4, 0.3  # inches for labels of rows and of columns, and for a title above these
LETTERS = 24  # in a line of a row's label
SIZE = 8  # of letters, in points
TEXT, FAINT = "#222222", "#777777"


def draw_grid(path: str | Path, pictures: Sequence[Sequence[Image.Image]], rows: Sequence[str],
              columns: Sequence[tuple[str, str]], title: str, marked: int | None = None) -> Path:
    """Writes pictures row by row, all of one size.

    Args:
        rows: a label for each.
        columns: a label for each, and a note below it.
        marked: the column whose label is bold.

    Raises:
        UserError: the file cannot be written.
    """
    size = pictures[0][0].size
    across, down = (TILE * side / max(size) for side in size)
    width = LEFT + len(columns) * (across + GAP)
    height = TITLE + TOP + len(rows) * (down + GAP)
    canvas = Canvas(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    canvas.text(2 * GAP / width, 1 - TITLE / 2 / height, title, fontsize=SIZE + 2, va="center", color=TEXT)
    for column, (label, note) in enumerate(columns):
        x = (LEFT + column * (across + GAP) + across / 2) / width
        canvas.text(x, 1 - (TITLE + TOP / 2) / height, label, fontsize=SIZE, ha="center", va="bottom", color=TEXT,
                    weight="bold" if column == marked else "normal")
        canvas.text(x, 1 - (TITLE + TOP / 2) / height, note, fontsize=SIZE - 1.5, ha="center", va="top", color=FAINT)
    for row, (label, line) in enumerate(zip(rows, pictures, strict=True)):
        bottom = height - TITLE - TOP - (row + 1) * (down + GAP) + GAP
        text = textwrap.fill(label, LETTERS, break_on_hyphens=False)
        canvas.text((LEFT - 0.1) / width, (bottom + down / 2) / height, text, fontsize=SIZE, ha="right", va="center",
                    linespacing=1.3, color=TEXT)
        for column, picture in enumerate(line):
            left = LEFT + column * (across + GAP)
            axes = canvas.add_axes((left / width, bottom / height, across / width, down / height))
            axes.imshow(picture)
            axes.set_axis_off()
    return write_atomically(path, lambda aside: canvas.savefig(aside, format="png"))
