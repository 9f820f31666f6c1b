"""Painted masks: which file belongs to which photo, and files that are no masks."""
from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm.common.errors import UserError
from ldm.data.mask_files import check_not_inverted, pair_masks, read_painted_mask


def noise(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((64, 64))


def subject() -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    return mask


def folders(tmp_path: Path, photos: list[str], masks: list[str]) -> tuple[list[Path], Path]:
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    for seed, photo in enumerate(photos):
        noise(seed).save(tmp_path / "photos" / photo)
    for mask in masks:
        subject().save(tmp_path / "masks" / mask)
    return [tmp_path / "photos" / photo for photo in photos], tmp_path / "masks"


@pytest.mark.parametrize(("photos", "masks", "expected"), [
    (["a.png"], ["a.png"], ["a.png"]),
    (["a.jpg"], ["a.png"], ["a.png"]),
    (["a.jpg", "a.png"], ["a.jpg", "a.png"], ["a.jpg", "a.png"]),
    (["a.png"], ["a.bmp", "a.png"], ["a.png"]),
    (["a.b.jpg"], ["a.b.png"], ["a.b.png"]),
    (["a.b.jpg"], ["a.b.jpg.png"], ["a.b.jpg.png"]),
    (["a.jpg", "a.png"], ["a.jpg.png", "a.png.png"], ["a.jpg.png", "a.png.png"]),
    (["IMG_1.JPG"], ["img_1.png"], ["img_1.png"]),
])
def test_pairs(tmp_path: Path, photos: list[str], masks: list[str], expected: list[str]) -> None:
    paths, folder = folders(tmp_path, photos, masks)
    assert [path.name for path in pair_masks(folder, paths)] == expected


@pytest.mark.parametrize(("photos", "masks", "named"), [
    (["a.jpg", "a.bmp"], ["a.png"], ["a.png", "a.jpg", "a.bmp"]),
    (["a.jpg"], ["a.bmp", "a.png"], ["a.bmp", "a.png", "a.jpg"]),
    (["a.jpg", "b.jpg"], ["a.png"], ["b.jpg"]),
])
def test_ambiguous_and_missing_masks_are_named(tmp_path: Path, photos: list[str], masks: list[str], named: list[str]
                                               ) -> None:
    paths, folder = folders(tmp_path, photos, masks)
    with pytest.raises(UserError) as error:
        pair_masks(folder, paths)
    assert all(name in str(error.value) for name in named)


def test_the_folder_of_the_photos_is_no_folder_of_masks(tmp_path: Path) -> None:
    paths, _ = folders(tmp_path, ["a.png"], [])
    with pytest.raises(UserError, match="is the folder of the photos"):
        pair_masks(tmp_path / "photos", paths)


@pytest.mark.parametrize(("make", "message"), [
    (lambda photo: Image.new("L", photo.size, 128), "one gray level"),
    (lambda photo: Image.new("L", photo.size, 0), "black everywhere"),
    (lambda photo: photo, "is the photo itself"),
    (lambda photo: photo.resize((128, 128)), "is the photo itself"),
    (lambda photo: subject().resize((64, 32)), "64x32 does not fit"),
])
def test_files_that_are_no_masks(tmp_path: Path, make: Callable[[Image.Image], Image.Image], message: str) -> None:
    photo = noise(0)
    make(photo).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=message):
        read_painted_mask(tmp_path / "m.png", photo)


def test_white_masks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "m.png")
    with caplog.at_level(logging.WARNING):
        read_painted_mask(tmp_path / "m.png", noise(0))
    assert "white everywhere" in caplog.text


def test_inverted_masks_are_refused_if_most_are(caplog: pytest.LogCaptureFixture) -> None:
    right, wrong = subject(), ImageOps.invert(subject())
    with caplog.at_level(logging.WARNING):
        check_not_inverted({Path("m/a.png"): right, Path("m/b.png"): wrong, Path("m/c.png"): right,
                            Path("m/d.png"): Image.new("L", (64, 64), 255)})
    assert "b.png" in caplog.text and "a.png" not in caplog.text and "d.png" not in caplog.text
    with pytest.raises(UserError, match="most masks are white at the edges"):
        check_not_inverted({Path("m/a.png"): right, Path("m/b.png"): wrong, Path("m/c.png"): wrong})


def test_good_masks_pass_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subject().save(tmp_path / "m.png")
    shutil.copy(tmp_path / "m.png", tmp_path / "n.png")
    with caplog.at_level(logging.WARNING):
        mask = read_painted_mask(tmp_path / "n.png", noise(0))
    assert not caplog.text and mask.tobytes() == subject().tobytes()
