"""Numbered image files with their settings inside, and contact sheets."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.inference.output_folder import MAX_COLUMNS, OutputFolder, read_metadata


def image(color: str = "red", side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def test_numbers_continue_and_sheets_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.inference.output_folder.ROWS", 2)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00041.png").touch()
    (tmp_path / "samples" / "mine.png").touch()
    folder = OutputFolder(tmp_path, columns=2)
    for number in range(5):
        folder.add(Image.new("RGB", (16, 16)), "a prompt", {"number": number, "word": "<émile>"})
    folder.finish_sheet()
    folder.finish_sheet()
    assert [path.name for path in folder.images] == [f"000{number}.png" for number in range(42, 47)]
    assert [path.name for path in folder.sheets] == ["grid-0000.png", "grid-0001.png"]
    assert read_metadata(folder.images[4]) == {"number": 4, "word": "<émile>"}
    assert json.loads(Image.open(folder.images[0]).text["perfusion"])["number"] == 0


def test_nothing_is_created_before_the_first_image(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "new" / "out", columns=2)
    folder.finish_sheet()
    assert not (tmp_path / "new").exists() and folder.images == folder.sheets == []
    assert folder.add(image(), "a prompt", {}) == tmp_path / "new" / "out" / "samples" / "00000.png"


def test_an_image_keeps_its_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = OutputFolder(tmp_path, columns=1).add(Image.fromarray(noise), "a prompt", {"seed": 1})
    assert np.array_equal(np.asarray(Image.open(path)), noise)


def test_two_runs_in_one_folder_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """The second run started before the first one wrote its images."""
    first, second = OutputFolder(tmp_path, columns=2), OutputFolder(tmp_path, columns=2)
    paths = [folder.add(image(), "a prompt", {"run": run}) for run, folder in enumerate((first, second, first))]
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert [read_metadata(path)["run"] for path in paths] == [0, 1, 2]
    for folder in (first, second):
        folder.finish_sheet()
    assert [sheet.name for folder in (first, second) for sheet in folder.sheets] == ["grid-0000.png", "grid-0001.png"]


def test_extra_images_have_their_own_numbers(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, columns=2)
    masks = [folder.add_extra("mask", image(color)) for color in ("white", "black")]
    assert [path.name for path in masks] == ["mask-0000.png", "mask-0001.png"]
    assert folder.images == [] and np.asarray(Image.open(masks[0])).min() == 255


def test_a_sheet_has_a_row_for_each_group_of_columns(tmp_path: Path) -> None:
    wide, narrow = OutputFolder(tmp_path / "wide", columns=4), OutputFolder(tmp_path / "narrow", columns=1)
    for folder in (wide, narrow):
        for _ in range(4):
            folder.add(image(), "a prompt", {})
        folder.finish_sheet()
    (wide_width, wide_height), (narrow_width, narrow_height) = (Image.open(folder.sheets[0]).size
                                                                for folder in (wide, narrow))
    assert wide_width > narrow_width and wide_height < narrow_height
    assert OutputFolder(tmp_path, columns=100).columns == MAX_COLUMNS


def test_the_summary_names_the_files(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, columns=2)
    folder.add(image(), "a prompt", {})
    folder.finish_sheet()
    samples, sheet = tmp_path / "samples", tmp_path / "grid-0000.png"
    assert folder.summary() == f"1 image: {samples / '00000.png'}\nwith their prompts: {sheet}"
    folder.add(image(), "a prompt", {})
    assert folder.summary() == f"2 images: {samples / '00000.png'} to 00001.png\nwith their prompts: {sheet}"


def test_other_images_have_no_metadata(tmp_path: Path) -> None:
    image().save(tmp_path / "photo.jpg")
    image().save(tmp_path / "photo.png")
    assert read_metadata(tmp_path / "photo.jpg") == read_metadata(tmp_path / "photo.png") == {}


def test_folders_that_are_written_to_in_turns_say_so(tmp_path: Path) -> None:
    first, second = OutputFolder(tmp_path, columns=2), OutputFolder(tmp_path, columns=2)
    for folder in (first, second, first):
        folder.add(image(), "a prompt", {})
    first.finish_sheet()
    assert first.summary().splitlines()[0] == (f"2 images: {tmp_path / 'samples' / '00000.png'} to 00002.png, "
                                               "between those of another run")


RACE = """
import sys
from PIL import Image
from ldm.inference.output_folder import OutputFolder
folder, image = OutputFolder(sys.argv[1], 4), Image.effect_noise((64, 64), 60).convert("RGB")
for number in range(30):
    folder.add(image, "", {"who": sys.argv[2], "number": number})
    folder.add_extra("mask", image)
    folder.finish_sheet()
"""


def test_processes_that_write_at_once_lose_no_image(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), who]) for who in "AB"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    written = [read_metadata(path) for path in (tmp_path / "samples").iterdir()]
    assert sorted((one["who"], one["number"]) for one in written) == [(who, n) for who in "AB" for n in range(30)]
    for kind in ("mask", "grid"):
        assert len(list(tmp_path.glob(f"{kind}-*.png"))) == 60
