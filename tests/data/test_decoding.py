"""Frames, bits and rotations of image files."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.photo_files import save_heic, scene
from PIL import Image, ImageSequence

from ldm.data.images import read_image, read_mask


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(("suffix", "options"), [
    ("gif", {}), ("png", {"default_image": False}), ("webp", {"lossless": True}), ("tif", {}),
    ("avif", {"quality": 100})])
def test_the_first_frame_is_read_and_a_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str,
                                                    options: dict[str, object]) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(path)))) == 3
    assert np.abs(values(read_image(path)) - [255, 0, 0]).max() <= 3
    read_image(path)
    assert caplog.messages == [f"{path}: has several frames or pages; the first is used"]


def test_a_second_picture_that_is_no_frame_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Phones add depth and brightness maps to their photos."""
    scene().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[scene(24, 16)])
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    save_heic(scene(), tmp_path / "a.heic")
    for name in ("a.jpg", "a.heic"):
        assert read_image(tmp_path / name).size == (48, 32)
    assert not caplog.messages


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 4e6])
def test_floats_are_scaled_to_their_white(tmp_path: Path, white: float) -> None:
    levels = np.linspace(0, white, 256).astype(np.float32).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    for read in (read_image(tmp_path / "a.tif").getchannel(0), read_mask(tmp_path / "a.tif")):
        assert np.array_equal(values(read).ravel(), np.arange(256))


def test_floats_that_are_no_numbers_are_black(tmp_path: Path) -> None:
    levels = np.full((16, 16), 0.5, np.float32)
    levels[0] = np.nan, *[np.inf] * 15
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert values(read_mask(tmp_path / "a.tif"))[0].max() == 0 and values(read_mask(tmp_path / "a.tif"))[1, 0] == 128


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "webp", "jpg", "avif"])
def test_photos_of_all_formats_are_turned_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    scene().save(tmp_path / f"plain.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene().save(tmp_path / f"turned.{suffix}", exif=exif)
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
             7: "TRANSVERSE", 8: "ROTATE_90"}
    expected = read_image(tmp_path / f"plain.{suffix}")
    if orientation in turns:
        expected = expected.transpose(Image.Transpose[turns[orientation]])
    assert np.abs(values(read_image(tmp_path / f"turned.{suffix}")) - values(expected)).max() <= 3
