"""Image files of every kind that people have, good and bad."""
from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ldm.common.errors import UserError
from ldm.data.images import (
    crop_and_resize,
    crop_square,
    from_tensor,
    largest_crop_size,
    list_images,
    load_folder,
    read_image,
    read_mask,
    to_tensor,
)


def gradient(width: int = 40, height: int = 24) -> Image.Image:
    """An image whose rows and columns all differ, so that every wrong rotation shows."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) * 2], axis=-1).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.png"
    gradient().save(path, exif=exif.tobytes())
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(values(read_image(path)), values(expected))
    assert read_image(path).size == ((40, 24) if orientation < 5 else (24, 40))


def test_a_rotated_jpeg_shows_the_scene_upright(tmp_path: Path) -> None:
    scene = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored rows run down the scene
    scene.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif.tobytes(), quality=98, subsampling=0)
    assert np.abs(values(read_image(tmp_path / "a.jpg")) - values(scene)).mean() < 2


@pytest.mark.parametrize("block", [b"", b"Exif\x00\x00", b"Exif\x00\x00garbage that is no TIFF", b"\xff" * 64])
def test_a_damaged_exif_block_is_ignored(tmp_path: Path, block: bytes) -> None:
    gradient().save(tmp_path / "a.jpg", exif=block)
    assert read_image(tmp_path / "a.jpg").size == (40, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    opacity = Image.new("L", (40, 24), 255)
    opacity.paste(0, (0, 0, 20, 24))
    image = Image.new("RGB", (40, 24), (60, 60, 60))
    image.putalpha(opacity)
    image.convert(mode).save(tmp_path / "cut.png")
    read = values(read_image(tmp_path / "cut.png"))
    assert (read[:, :20] == 255).all()
    assert np.abs(read[:, 20:] - 60).max() <= 3  # a palette may be off by a little


def test_a_transparent_color_is_blended_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (0, 100, 200, 51)).save(tmp_path / "a.png")  # 51/255 = 1/5
    assert np.abs(values(read_image(tmp_path / "a.png"))[0, 0] - [204, 224, 244]).max() <= 1


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("1", "png"), ("P", "bmp"), ("RGB", "webp"), ("L", "jpg")])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    gradient().convert(mode).save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    assert (read.mode, read.size) == ("RGB", (40, 24))


def test_cmyk_keeps_its_colors(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 40, 90)).convert("CMYK").save(tmp_path / "print.jpg", quality=98)
    assert np.abs(values(read_image(tmp_path / "print.jpg"))[16, 16] - [200, 40, 90]).max() < 6


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.array_equal(values(read_image(tmp_path / "a.png"))[..., 0].ravel(), np.arange(256))


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    kinds = ("empty", "text", "truncated", "headless", "tiny", "wide", "bomb", "bigger")
    paths = {kind: folder / f"{kind}.png" for kind in kinds}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("not an image at all")
    gradient(200, 200).save(paths["truncated"], format="JPEG")
    whole = paths["truncated"].read_bytes()
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["headless"].write_bytes(whole[100:])
    gradient(15, 40).save(paths["tiny"])
    gradient(400, 8).save(paths["wide"])
    paths["bomb"].write_bytes(huge_png(60_000))
    paths["bigger"].write_bytes(huge_png(10_000))
    return paths


@pytest.mark.filterwarnings("error")
def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    for kind, path in {**bad_files(tmp_path), "missing": tmp_path / "missing.png"}.items():
        with pytest.raises(UserError) as refused:
            read_image(path)
        assert f"{kind}.png" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_raise_only_user_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{data.draw(st.sampled_from(['png', 'jpg', 'webp', 'bmp']))}"
    gradient().save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert read_image(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)


def test_list_images_sorts_and_skips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.JPG", "a.png", "c.WebP", "d.bmp", "e.jpeg", ".hidden.png", "a.txt", "b.JPG.txt", "notes.txt",
                 "x.HEIC"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG", "c.WebP", "d.bmp", "e.jpeg",
                                                                 "x.HEIC"]
    line, = caplog.messages
    assert line.endswith("left out folder.png (a folder), notes.txt (an empty file)")


def test_relative_folders_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(list_images("models/mini/examples/teddy")) == 5
    (tmp_path / "models" / "mini" / "examples" / "teddy").mkdir(parents=True)  # the working directory comes first
    gradient().save(tmp_path / "models" / "mini" / "examples" / "teddy" / "mine.png")
    assert [path.name for path in list_images("models/mini/examples/teddy")] == ["mine.png"]


def test_list_images_names_the_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=folder.name):
            list_images(folder)


def test_load_folder_uses_what_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = bad_files(tmp_path / "photos")
    gradient().save(tmp_path / "photos" / "good.png")
    with caplog.at_level(logging.WARNING):
        loaded = load_folder(tmp_path / "photos")
    assert [(path.name, image.size) for path, image in loaded] == [("good.png", (40, 24))]
    assert len(caplog.records) == len(bad)
    assert all(path.name in caplog.text for path in bad.values())


def test_load_folder_with_nothing_usable(tmp_path: Path) -> None:
    bad_files(tmp_path / "photos")
    with pytest.raises(UserError, match="photos"):
        load_folder(tmp_path / "photos")


def test_a_mask_is_its_brightness_or_its_opacity(tmp_path: Path) -> None:
    mask = Image.new("L", (20, 20), 0)
    mask.paste(255, (5, 5, 15, 15))
    mask.save(tmp_path / "mask.png")
    cut_out = Image.new("RGB", (20, 20), "black")
    cut_out.putalpha(mask)
    cut_out.save(tmp_path / "cut.png")
    for name in ("mask.png", "cut.png"):
        assert np.array_equal(values(read_mask(tmp_path / name)), values(mask))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_opaque_mask_is_its_brightness(tmp_path: Path, mode: str) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 16, 16))
    mask.convert(mode).save(tmp_path / "mask.png", **({"transparency": 7} if mode == "P" else {}))
    assert np.array_equal(values(read_mask(tmp_path / "mask.png")), values(mask))


def test_a_folder_without_permission_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(UserError, match="cannot be read .Permission denied.; allow it"):
        list_images(tmp_path)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33)])
def test_crop_square_is_centered(shape: tuple[int, int]) -> None:
    side = min(shape)
    expected = ImageOps.fit(gradient(*shape), (side, side))
    assert np.array_equal(values(crop_square(gradient(*shape), side)), values(expected))


def test_crop_square_averages_fine_detail() -> None:
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    small = values(crop_square(board, 32))[2:-2, 2:-2]  # nearest-neighbour sampling would give 0 or 255
    assert np.abs(small - 127.5).max() < 4


def test_tensors_and_back() -> None:
    image = gradient()
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((3, 24, 40), torch.float32)
    expected = values(image)[5, 7] / 255 * 2 - 1
    assert np.allclose(tensor[:, 5, 7].numpy(), expected, atol=1e-6)
    assert to_tensor(Image.new("RGB", (4, 4), "white")).eq(1).all()
    assert to_tensor(Image.new("RGB", (4, 4), "black")).eq(-1).all()
    assert np.array_equal(values(from_tensor(tensor)), values(image))
    assert np.array_equal(values(from_tensor(tensor * 1000)), np.where(tensor.numpy() > 0, 255, 0).transpose(1, 2, 0))


@pytest.mark.parametrize(("size", "target", "crop"), [
    ((640, 480), (64, 64), (480, 480)), ((640, 480), (96, 64), (640, 427)), ((640, 480), (64, 96), (320, 480)),
    ((48, 64), (96, 64), (48, 32)), ((64, 64), (512, 512), (64, 64)), ((16, 4000), (4096, 8), (16, 1)),
])
def test_the_largest_center_crop_is_used(
    size: tuple[int, int], target: tuple[int, int], crop: tuple[int, int]
) -> None:
    assert largest_crop_size(size, *target) == crop
    image = gradient(*size)
    left, top = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    expected = image.crop((left, top, left + crop[0], top + crop[1]))
    assert np.array_equal(values(crop_and_resize(image, *crop)), values(expected))  # nothing to resample
    assert crop_and_resize(image, *target).size == target
