"""Pictures in numbered files beside those of earlier runs, each with a note of how it was made, and contact sheets."""
from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ldm.common.files import write_atomically
from ldm.data.images import save_grid

NOTE = "perfusion"  # the text chunk of a PNG that says, as JSON, how the picture was made
MOST_COLUMNS = 8
ROWS = 16  # of one contact sheet; more of them go on further sheets, so that memory does not grow with the run


class Album:
    """A folder with `samples/00000.png`, ... and `grid-0000.png`, ...; numbers go on where earlier runs ended.

    Args:
        folder: made as soon as there is a picture to put there.
        columns: pictures in a row of the contact sheets, at most `MOST_COLUMNS`.
    """

    def __init__(self, folder: str | Path, columns: int) -> None:
        self.folder, self.columns = Path(folder), min(columns, MOST_COLUMNS)
        self.pictures: list[Path] = []
        self.sheets: list[Path] = []
        self._waiting: list[tuple[Image.Image, str]] = []
        self._free_pictures = _free(self.folder / "samples", "", 5)
        self._free_sheets = _free(self.folder, "grid-", 4)

    def add(self, picture: Image.Image, title: str, note: Mapping[str, Any]) -> Path:
        """Writes a picture as PNG with `note` in it and puts it on the contact sheet under `title`."""
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(NOTE, json.dumps(note))
        path = next(self._free_pictures)
        write_atomically(path, lambda aside: picture.save(aside, format="PNG", pnginfo=chunks))
        self.pictures.append(path)
        self._waiting.append((picture, title))
        if len(self._waiting) == self.columns * ROWS:
            self.finish_sheet()
        return path

    def add_beside(self, name: str, picture: Image.Image) -> Path:
        """Writes a picture that belongs to the run but was not drawn, such as a mask, as `<name>-0000.png`."""
        path = next(_free(self.folder, f"{name}-", 4))
        return write_atomically(path, lambda aside: picture.save(aside, format="PNG"))

    def finish_sheet(self) -> None:
        """Writes the contact sheet of what was added since the last one, if anything was."""
        if self._waiting:
            pictures, titles = zip(*self._waiting, strict=True)
            self.sheets.append(save_grid(pictures, next(self._free_sheets), self.columns, titles))
            self._waiting.clear()


def read_note(path: str | Path) -> dict[str, Any]:
    """How a picture of an album was made; empty for any other picture."""
    with Image.open(path) as opened:
        return json.loads(opened.info.get(NOTE, "{}"))


def _free(folder: Path, prefix: str, digits: int) -> Iterator[Path]:
    """Numbered paths that no file has, from one past the highest number in the folder on."""
    numbered = re.compile(rf"{re.escape(prefix)}(\d+)\.png")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(match[1]) for match in map(numbered.fullmatch, names) if match]
    for place in itertools.count(max(taken, default=-1) + 1):
        path = folder / f"{prefix}{place:0{digits}d}.png"
        if not path.exists():
            yield path
