"""Folders of pictures as training sets."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.common.errors import UserError
from ldm.data.folder import PictureFolder
from ldm.data.images import square, to_tensor


def folder_of(path: Path, count: int, size: tuple[int, int] = (48, 32)) -> Path:
    path.mkdir()
    for number in range(count):
        Image.effect_noise(size, 20 + number).convert("RGB").save(path / f"{number:03}.png")
    return path


def test_parts_share_no_picture_and_leave_none_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 43)
    names = {part: [path.name for path in PictureFolder(folder, part=part).paths]
             for part in ("all", "training", "validation")}
    assert names["validation"] == ["000.png", "020.png", "040.png"]
    assert sorted(names["training"] + names["validation"]) == names["all"] and len(names["all"]) == 43


def test_the_largest_square_in_the_middle(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 2)
    item = PictureFolder(folder, size=24)[1]["image"]
    assert torch.equal(item, to_tensor(square(Image.open(folder / "001.png"), 24)))


def test_random_squares_lie_within_the_picture(tmp_path: Path) -> None:
    """Of a picture that is as red as it is far right and as green as it is far down, a square's place can be read."""
    (tmp_path / "p").mkdir()
    across, down = torch.meshgrid(torch.arange(200), torch.arange(100), indexing="xy")
    pixels = torch.stack([across, down, torch.zeros_like(down)], -1).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "p" / "a.png")
    data = PictureFolder(tmp_path / "p", size=50, random_crop=True)
    torch.manual_seed(0)
    sides, lefts = [], []
    for _ in range(40):
        red, green, _ = (data[0]["image"] + 1) * 127.5
        side = float(green[-1, 25] - green[0, 25]) * 50 / 49
        assert side == pytest.approx(float(red[25, -1] - red[25, 0]) * 50 / 49, abs=4)  # it is a square
        sides.append(side)
        lefts.append(float(red[25, 0]))
    assert 46 < min(sides) < 60 and 90 < max(sides) < 102
    assert min(lefts) < 20 and max(lefts) > 100


def test_what_cannot_be_read_gives_way_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "p", 3)
    (folder / "002.png").write_bytes(b"no picture")
    data = PictureFolder(folder, size=16)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(data[2]["image"], data[0]["image"])
    assert "002.png" in caplog.text
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its pictures"):
        data[0]


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="single picture"):
        PictureFolder(folder_of(tmp_path / "one", 1), part="training")
    with pytest.raises(UserError, match="no such folder"):
        PictureFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="size: 0"):
        PictureFolder(tmp_path / "one", size=0)
