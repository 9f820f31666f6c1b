"""Write numbered image files with their settings as metadata, and contact sheets. Files of earlier runs stay."""
from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ldm.common.atomic_write import write_new
from ldm.common.paths import user_path
from ldm.data.contact_sheet import make_grid, save_quickly

METADATA_CHUNK = "perfusion"  # the text chunk of a PNG that holds, as JSON, how the image was made
MAX_COLUMNS = 8
ROWS = 16  # of one contact sheet; more rows go on further sheets, so that memory does not grow with the run


class OutputFolder:
    """A folder with `samples/00000.png`, ... and `grid-0000.png`, ...; numbers continue those of earlier runs.

    Several runs may write to it at a time: each takes the next free number.

    Args:
        folder: created when the first image is written.
        columns: images in a row of the contact sheets, at most `MAX_COLUMNS`.
        with_sheets: whether to write contact sheets.

    Attributes:
        images: paths of the images written so far.
        sheets: paths of the contact sheets written so far.
    """

    def __init__(self, folder: str | Path, columns: int, with_sheets: bool = True) -> None:
        self.folder, self.columns = user_path(folder), min(columns, MAX_COLUMNS)
        self.with_sheets = with_sheets
        self.images: list[Path] = []
        self.sheets: list[Path] = []
        self._pending: list[tuple[Image.Image, str]] = []
        self._free_images = _free_paths(self.folder / "samples", "", 5)
        self._free_sheets = _free_paths(self.folder, "grid-", 4)

    def add(self, image: Image.Image, title: str, metadata: Mapping[str, Any]) -> Path:
        """Write an image as PNG with `metadata` inside, and put it on the contact sheet under `title`."""
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(METADATA_CHUNK, json.dumps(metadata))
        path = write_new(self._free_images, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))
        self.images.append(path)
        self.show(image, title)
        return path

    def show(self, image: Image.Image, title: str) -> None:
        """Put an image on the contact sheet under `title`, without a file of its own."""
        if not self.with_sheets:
            return
        self._pending.append((image, title))
        if len(self._pending) == self.columns * ROWS:
            self.finish_sheet()

    def add_extra(self, name: str, image: Image.Image) -> Path:
        """Write an image that belongs to the run but was not generated, such as a mask, as `<name>-0000.png`."""
        return self.add_file(name, lambda temporary: image.save(temporary, format="PNG"))

    def add_file(self, name: str, write: Callable[[Path], object], suffix: str = ".png") -> Path:
        """Write a file that belongs to the run as `<name>-0000<suffix>`.

        Args:
            write: writes it to a temporary path.
        """
        return write_new(_free_paths(self.folder, f"{name}-", 4, suffix), write)

    def finish_sheet(self) -> None:
        """Write the contact sheet of the images added since the last one, if there are any."""
        if self._pending:
            images, titles = zip(*self._pending, strict=True)
            sheet = make_grid(images, self.columns, titles)
            self.sheets.append(write_new(self._free_sheets, lambda temporary: save_quickly(sheet, temporary)))
            self._pending.clear()

    def summary(self) -> str:
        """Describe the written files, for the end of a run."""
        first, last = self.images[0], self.images[-1]
        counted = f"{len(self.images)} images" if len(self.images) > 1 else "1 image"
        files = f"{first} to {last.name}" if last != first else str(first)
        if int(last.stem) - int(first.stem) >= len(self.images):
            files += ", between those of another run"
        return f"{counted}: {files}\nwith their prompts: {', '.join(map(str, self.sheets))}"


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return how an image of an `OutputFolder` was made; empty for any other image."""
    with Image.open(path) as opened:
        return json.loads(opened.info.get(METADATA_CHUNK, "{}"))


def _free_paths(folder: Path, prefix: str, digits: int, suffix: str = ".png") -> Iterator[Path]:
    """Yield numbered paths, starting after the highest number in the folder. Other runs may take some of them first."""
    numbered = re.compile(rf"{re.escape(prefix)}(\d+){re.escape(suffix)}")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    taken = [int(match[1]) for match in map(numbered.fullmatch, names) if match]
    for number in itertools.count(max(taken, default=-1) + 1):
        yield folder / f"{prefix}{number:0{digits}d}{suffix}"
