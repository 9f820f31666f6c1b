"""Photos as phones, cameras, browsers and programs save them, and what lies beside them."""
from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

P3_COLUMNS = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_COLUMNS = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
PROPHOTO_COLUMNS = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))
SRGB_COLUMNS = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
WHITE = (0.9642, 1.0, 0.8249)
MOVIE = b"\0\0\0\x14ftypqt  \0\0\2\0qt  \0\0\0\x08wide" + bytes(400)


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A colorful image without fine detail, so that lossy formats keep its colors."""
    corners = np.array([[[200, 60, 60], [60, 200, 90]], [[90, 90, 220], [128, 128, 128]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.NEAREST)


def icc_profile(columns: Sequence[Sequence[float]] = (), gamma: float = 2.2) -> bytes:
    """An ICC profile of an RGB space, by the XYZ of its primaries, or of gray without them. Version 2, as old files."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {name: b"XYZ " + bytes(4) + _fixed(column)
            for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=False)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC") if columns else (b"kTRC",), curve)
    return _profile(b"mntr", b"RGB " if columns else b"GRAY", b"XYZ ", tags)


def cmyk_profile() -> bytes:
    """An ICC profile of CMYK, whose table has the 16 corners of the space. The inks are those of a newspaper, dull."""
    inks = np.array([[60, -30, -40], [55, 60, 0], [88, -5, 80], [25, 0, 0]], float) - (95, 0, 0)
    corners = [np.add((95, 0, 0), sum(ink * share for ink, share in zip(inks, amounts, strict=True)))
               for amounts in np.ndindex(2, 2, 2, 2)]
    table = np.clip(np.array(corners) * (2.55, 1, 1) + (0, 128, 128), 0, 255).round().astype(np.uint8).tobytes()
    straight, identity = bytes(range(256)), _fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + 4 * straight + table + 3 * straight
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    described = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79),
                 b"wtpt": b"XYZ " + bytes(4) + _fixed(WHITE), b"cprt": b"text" + bytes(4) + b"none\0\0\0\0", **tags}
    table, body = struct.pack(">I", len(described)), b""
    for name, content in described.items():
        table += name + struct.pack(">II", 132 + 12 * len(described) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, kind, space, connection)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(WHITE)
    return header.ljust(128, b"\0") + table + body


def _fixed(numbers: Sequence[float]) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def save_heic(image: Image.Image, path: Path, **options: object) -> Path:
    pillow_heif.from_pillow(image).save(path, format="HEIF", quality=100, chroma=444, **options)
    return path


def make_phone_folder(folder: Path, photos: Sequence[Image.Image]) -> Path:
    """Write four or more square photos as a phone and its owner leave them; return the folder.

    HEIC with Display P3 and its Live Photo's video, a JPEG that is called HEIC, a sideways JPEG, a screenshot with
    alpha, a panorama, a photo twice, a browser's .jfif, and files that are no photos.
    """
    folder.mkdir(parents=True)
    p3 = icc_profile(P3_COLUMNS)
    save_heic(photos[0], folder / "IMG_0001.HEIC", icc_profile=p3)
    (folder / "IMG_0001.MOV").write_bytes(MOVIE)
    photos[1].save(folder / "IMG_0002.HEIC", format="JPEG", quality=95, icc_profile=p3)
    exif = Image.Exif()
    exif[0x0112] = 6
    photos[2].transpose(Image.Transpose.ROTATE_90).save(folder / "IMG_0003.jpg", exif=exif, quality=95)
    photos[2].save(folder / "IMG_0003 copy.jfif", format="JPEG", quality=95)
    screenshot = photos[3].convert("RGBA")
    screenshot.putalpha(255)
    screenshot.save(folder / "Screenshot.PNG")
    width, height = photos[0].size
    panorama = Image.new("RGB", (3 * width, height), "gray")
    panorama.paste(photos[0], (2 * width, 0))
    panorama.save(folder / "PANO.jpeg", quality=95)
    (folder / "IMG_0001.txt").write_text("on a table")
    (folder / "IMG_0001.AAE").write_text("<?xml version='1.0'?><plist/>")
    (folder / "notes.txt").write_text("which photos to use")
    (folder / "Thumbs.db").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(504))
    (folder / ".DS_Store").write_bytes(bytes(32))
    (folder / "originals").mkdir()
    return folder
