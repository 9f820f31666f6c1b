"""Folders of images as training sets."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.common.errors import UserError
from ldm.data.folder import ImageFolder
from ldm.data.images import crop_square, to_tensor
from ldm.util import instantiate_from_config


def folder_of(path: Path, count: int, size: tuple[int, int] = (48, 32)) -> Path:
    path.mkdir()
    for index in range(count):
        Image.effect_noise(size, 20 + index).convert("RGB").save(path / f"{index:03}.png")
    return path


def test_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 43)
    names = {split: [path.name for path in ImageFolder(folder, split=split).paths]
             for split in ("all", "training", "validation")}
    assert names["validation"] == ["000.png", "020.png", "040.png"]
    assert sorted(names["training"] + names["validation"]) == names["all"] and len(names["all"]) == 43


def test_configs_with_the_old_names_still_load(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path / "p", 21))
    config = {"target": "ldm.data.folder.PictureFolder", "params": {"data_root": folder, "part": "validation"}}
    data = instantiate_from_config(config)
    assert isinstance(data, ImageFolder) and [path.name for path in data.paths] == ["000.png", "020.png"]


def test_an_item_is_the_center_square(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 2)
    item = ImageFolder(folder, size=24)[1]["image"]
    assert torch.equal(item, to_tensor(crop_square(Image.open(folder / "001.png"), 24)))


def test_random_crops_lie_within_the_image(tmp_path: Path) -> None:
    """Red grows to the right and green downwards, so that the colors of a crop show its position."""
    (tmp_path / "p").mkdir()
    across, down = torch.meshgrid(torch.arange(200), torch.arange(100), indexing="xy")
    pixels = torch.stack([across, down, torch.zeros_like(down)], -1).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "p" / "a.png")
    data = ImageFolder(tmp_path / "p", size=50, random_crop=True)
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


def test_a_file_that_cannot_be_read_is_replaced_by_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path / "p", 3)
    (folder / "002.png").write_bytes(b"no image")
    data = ImageFolder(folder, size=16)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(data[2]["image"], data[0]["image"])
    assert "002.png" in caplog.text
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of its images"):
        data[0]


class CountedPaths(list):
    """A list that counts how many of its items are read."""

    reads = 0

    def __getitem__(self, key: int | slice) -> Path | list[Path]:
        self.reads += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
        return super().__getitem__(key)


def test_an_item_looks_at_one_path_however_many_there_are(tmp_path: Path) -> None:
    data = ImageFolder(folder_of(tmp_path / "p", 1), size=16)
    data.paths = CountedPaths(data.paths * 10_000)
    data[5_000]
    assert data.paths.reads == 1


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one image cannot be split"):
        ImageFolder(folder_of(tmp_path / "one", 1), split="training")
    with pytest.raises(UserError, match="no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="size: 0"):
        ImageFolder(tmp_path / "one", size=0)
