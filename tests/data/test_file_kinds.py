"""Files that are images whatever they are called, and files that are none."""
from __future__ import annotations

import io
import logging
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.photo_files import MOVIE, make_phone_folder, save_heic, scene
from PIL import Image, TiffImagePlugin

from ldm.common.errors import UserError
from ldm.data.file_kinds import HEADER_LENGTH, describe_file, foreign_kind
from ldm.data.images import list_images, load_folder, read_image, scan_folder

LOSSLESS = {"PNG": 0, "BMP": 0, "TIFF": 0, "TGA": 0, "PPM": 0, "QOI": 0, "PCX": 0, "ICO": 0, "DDS": 0}
LOSSY = {"JPEG": 12, "WEBP": 12, "JPEG2000": 12, "AVIF": 12, "GIF": 12, "HEIF": 12}
SUFFIXES = {
    "JPEG": [".jpg", ".JPG", ".jpeg", ".jpe", ".jfif", ".JFIF", ".jif", ".mpo", ".jpg_large", ".jpg!d", "", ".png",
             ".heic", ".tmp", ".1"],
    "HEIF": [".heic", ".HEIC", ".heif", ".hif", ".JPG", ".jpeg", ""], "AVIF": [".avif", ".heic", ".jpg", ""],
    "PNG": [".png", ".apng", ".jpg", "", ".webp", ".tiff"], "TIFF": [".tif", ".tiff", ".TIF", "", ".jpg"],
    "JPEG2000": [".jp2", ".j2k", ".jpx", ""], "WEBP": [".webp", ".jpg", ".png", ""], "GIF": [".gif", ".png", ""],
    "BMP": [".bmp", ".dib", ""], "TGA": [".tga", ".TGA", ".icb"], "PPM": [".ppm", ".pnm", ""], "QOI": [".qoi", ""],
    "PCX": [".pcx"], "ICO": [".ico"], "DDS": [".dds", ""]}
CASES = [(kind, suffix) for kind, suffixes in SUFFIXES.items() for suffix in suffixes]


def save(kind: str, path: Path, image: Image.Image | None = None) -> Path:
    image = image or scene()
    if kind == "HEIF":
        return save_heic(image, path)
    options = {"ICO": {"sizes": [image.size]}, "JPEG": {"quality": 100, "subsampling": 0},
               "AVIF": {"quality": 100, "subsampling": "4:4:4"}, "WEBP": {"quality": 100}}.get(kind, {})
    with path.open("wb") as file:
        image.save(file, format=kind, **options)
    return path


@pytest.mark.parametrize(("kind", "suffix"), CASES)
def test_images_are_known_by_their_content(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, suffix: str
                                           ) -> None:
    path = save(kind, tmp_path / f"photo{suffix}")
    ((found, image),) = load_folder(tmp_path)
    assert found == path and (image.mode, image.size) == ("RGB", (48, 32)) and not caplog.messages
    difference = np.abs(np.asarray(image, int) - np.asarray(scene(), int))
    assert np.median(difference, axis=(0, 1)).max() <= (LOSSLESS | LOSSY)[kind]  # lossy formats blur the edges


@pytest.mark.parametrize(("name", "content", "kind"), [
    ("IMG_1.MOV", MOVIE, "a video"), ("a.mp4", b"\0\0\0\x20ftypisom" + bytes(99), "a video"),
    ("a.m4v", b"\0\0\0\x20ftypM4V " + bytes(99), "a video"), ("a.3gp", b"\0\0\0\x20ftyp3gp5" + bytes(9), "a video"),
    ("old.mov", b"\0\0\0\x08wide\0\0\1\0mdat" + bytes(99), "a video"), ("no suffix", MOVIE, "a video"),
    ("a.avi", b"RIFF\0\1\0\0AVI LIST" + bytes(99), "a video"), ("a.webm", b"\x1aE\xdf\xa3" + bytes(99), "a video"),
    ("a.mpg", b"\0\0\x01\xba" + bytes(99), "a video"), ("a.CR3", b"\0\0\0\x18ftypcrx " + bytes(99), "RAW"),
    ("a.cr2", b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "RAW"), ("raw", b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "RAW"),
    ("a.NEF", b"MM\0*" + bytes(99), "RAW"), ("a.dng", b"II*\0" + bytes(99), "RAW"),
    ("a.ARW", bytes(99), "RAW"), ("raf", b"FUJIFILMCCD-RAW 0201" + bytes(99), "RAW"),
    ("notes.txt", b"hello", "a text file"), ("liesmich.md", "Größe: 猫".encode() * 99, "a text file"),
    ("page.html", b"<!DOCTYPE html><html>", "a web page"), ("a.svg", b"<?xml version='1.0'?><svg/>", "a drawing"),
    ("a.pdf", b"%PDF-1.7", "a PDF"), ("IMG_1.xmp", b"<x/>", "a sidecar file"), ("IMG_1.jpg.json", b"{}", "sidecar"),
    ("Thumbs.db", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504), "no image"), ("empty", b"", "an empty file"),
    ("zeros.bin", bytes(999), "no image"), ("desktop.ini", "[a]\r\nb=1".encode("utf-16"), "no image"),
    ("model.safetensors", struct.pack("<Q", 2) + b"{}" + bytes(99), "no image"), ("a.ps", b"%!PS-Adobe", "PostScript"),
    ("photo.zip", b"PK\x03\x04" + bytes(99), "a ZIP archive")])
def test_other_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, kind: str
                               ) -> None:
    save("PNG", tmp_path / "good.png")
    (tmp_path / name).write_bytes(content)
    assert [path.name for path in list_images(tmp_path)] == ["good.png"]
    line, = caplog.messages
    assert f"left out {name} (" in line and kind in line


@pytest.mark.parametrize(("content", "kind"), [
    (MOVIE, "a video"), (b"<html>404", "a web page"), (b"%PDF-1.7", "a PDF"), (b"", "an empty file"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "PostScript"),
    (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "RAW")])
def test_other_files_under_an_image_suffix_are_named_when_read(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    remedy = "export it as JPEG" if kind == "RAW" else "copy or save it again as JPEG or PNG"
    with pytest.raises(UserError, match=f"photo.jpg: cannot be read .*{kind}.*; {remedy}$"):
        read_image(tmp_path / "photo.jpg")


def test_folders_and_broken_links_are_named_and_hidden_files_are_not(tmp_path: Path) -> None:
    save("PNG", tmp_path / "good.png")
    save("PNG", tmp_path / ".hidden.png")
    (tmp_path / "._good.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "good.png")
    content = scan_folder(tmp_path)
    assert [path.name for path in content.images] == ["good.png", "link"]
    assert content.left_out == {"gone.jpg": "a broken link", "more": "a folder"}


def test_captions_beside_photos_are_not_left_out(tmp_path: Path) -> None:
    for name in ("cat.jpg", "dog.JPEG"):
        save("JPEG", tmp_path / name)
    for name in ("cat.txt", "dog.JPEG.txt", "bird.txt"):
        (tmp_path / name).write_text("on a table")
    assert scan_folder(tmp_path).left_out == {"bird.txt": "a text file"}


def test_many_files_that_are_left_out_are_one_short_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("PNG", tmp_path / "good.png")
    for number in range(100):
        (tmp_path / f"{number:03}.mov").write_bytes(MOVIE)
    list_images(tmp_path)
    line, = caplog.messages
    assert "019.mov (a video) and 80 more" in line


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.MOV").write_bytes(MOVIE)
    with pytest.raises(UserError, match=r"no images in this folder, only IMG_1.MOV \(a video\); put photos there"):
        list_images(tmp_path)


@pytest.mark.parametrize("suffix", ["dng", "tif", ""])
def test_the_small_preview_of_a_raw_file_is_not_taken_for_the_photo(tmp_path: Path, suffix: str) -> None:
    save("PNG", tmp_path / "good.png")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    tags.tagtype[50706] = 1
    scene().save(tmp_path / f"raw.{suffix}".rstrip("."), format="TIFF", tiffinfo=tags)
    assert [path.name for path, _ in load_folder(tmp_path)] == ["good.png"]


def test_jpeg_xl_without_its_plugin_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.data.decoding.JXL_PLUGINS", ("no_such_plugin",))
    monkeypatch.delitem(Image.OPEN, "JXL", raising=False)
    save("PNG", tmp_path / "good.png")
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(99))
    assert len(load_folder(tmp_path)) == 1
    assert "a.jxl" in caplog.text and "pip install pillow-jxl-plugin" in caplog.text


def test_large_folders_are_listed_without_a_look_into_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    for number in range(50):
        (tmp_path / f"{number}.jpg").touch()
    monkeypatch.setattr("ldm.data.images.can_open", lambda path: pytest.fail(f"{path} was opened"))
    assert len(list_images(tmp_path)) == 50


def test_a_folder_as_a_phone_makes_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = [scene(64, 64).rotate(90 * turn) for turn in range(4)]
    folder = make_phone_folder(tmp_path / "DCIM", photos)
    with caplog.at_level(logging.WARNING):
        loaded = {path.name: image for path, image in load_folder(folder)}
    assert list(loaded) == ["IMG_0001.HEIC", "IMG_0002.HEIC", "IMG_0003 copy.jfif", "IMG_0003.jpg", "PANO.jpeg",
                            "Screenshot.PNG"]
    line, = caplog.messages
    assert line.endswith("left out IMG_0001.AAE (a sidecar file), IMG_0001.MOV (a video), Thumbs.db (no image), "
                         "notes.txt (a text file), originals (a folder)")
    turned, straight = (np.asarray(loaded[name], int) for name in ("IMG_0003.jpg", "IMG_0003 copy.jfif"))
    assert np.abs(turned - straight).max() <= 8
    red = loaded["IMG_0001.HEIC"].getpixel((8, 8))  # (200, 60, 60) in Display P3
    assert red[0] >= 212 and max(red[1:]) <= 56


def test_texts_are_told_from_bytes_also_at_the_end_of_the_header() -> None:
    for size in range(HEADER_LENGTH - 4, HEADER_LENGTH + 4):
        assert foreign_kind(("a" * size + "猫猫猫").encode()[:HEADER_LENGTH]) == "a text file"
    assert foreign_kind(b"\xff\xfe\xfd" * 200) is None and foreign_kind(b"P3\n2 2\n255\n1 2 3") is None


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ldm.data.file_kinds.read_header", refuse)
    assert describe_file(tmp_path / "secret") == "cannot be read: Permission denied"


def test_an_archive_of_images_is_no_image(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.png", b"x")
    assert foreign_kind(content.getvalue()[:HEADER_LENGTH]) == "a ZIP archive"
