"""Contact sheets."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.contact_sheet import save_grid


def test_a_grid_shows_every_image_enlarged(tmp_path: Path) -> None:
    colors = ["red", "lime", "blue", "yellow", "magenta"]
    images = [Image.new("RGB", (64, 64), color) for color in colors]
    with Image.open(save_grid(images, tmp_path / "deep" / "grid.png", columns=2)) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        counts = {color: number for number, color in sheet.getcolors()}
        assert sheet.width >= 2 * 128 and sheet.height >= 3 * 128
    for image in images:
        assert counts[image.getpixel((0, 0))] == 128 * 128
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_grid_titles_are_written_above_and_wrapped(tmp_path: Path) -> None:
    images = [Image.new("RGB", (128, 128), "red")] * 2

    def band(title: str) -> np.ndarray:
        with Image.open(save_grid(images, tmp_path / "g.png", 2, [title, ""])) as sheet:
            pixels = np.asarray(sheet.convert("RGB")).astype(int)
        red = (pixels == [255, 0, 0]).all(-1)
        assert red.sum() == 2 * 128 * 128  # no letter stands on a image
        ink = (pixels.sum(-1) < 200) & ~red
        assert not ink[:, 6 + 128 + 2 :].any()  # nor runs out of its column
        return ink[: red.any(1).argmax()]

    short, long = band("teddy"), band("a photo of a teddy in a field of very many flowers")
    assert short.any() and long.shape[0] > short.shape[0]
    assert band("w" * 60).shape[0] > short.shape[0]
    assert not band("").any()


@pytest.mark.parametrize(("count", "columns", "titles"), [(0, 1, None), (2, 0, None), (2, 1, ["one"])])
def test_impossible_grids_are_refused(tmp_path: Path, count: int, columns: int, titles: list[str] | None) -> None:
    with pytest.raises(ValueError, match="no contact sheet"):
        save_grid([Image.new("RGB", (40, 24))] * count, tmp_path / "g.png", columns, titles)
    assert not list(tmp_path.iterdir())
