"""Colors that files describe in any way are read as sRGB. The oracle of profiles is LittleCMS called directly."""
from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from helpers.photo_files import (
    ADOBE_COLUMNS,
    P3_COLUMNS,
    PROPHOTO_COLUMNS,
    SRGB_COLUMNS,
    cmyk_profile,
    icc_profile,
    save_heic,
    scene,
)
from PIL import Image, ImageCms, PngImagePlugin

from ldm.data.color import to_srgb
from ldm.data.images import convert_image, read_image, read_mask
from ldm.data.matrix_profile import ADOBE_RGB, BT2020, DISPLAY_P3, SRGB, matrix_profile

PROFILES = {"Display P3": icc_profile(P3_COLUMNS), "Adobe RGB": icc_profile(ADOBE_COLUMNS, 563 / 256),
            "ProPhoto": icc_profile(PROPHOTO_COLUMNS, 1.8), "linear": icc_profile(SRGB_COLUMNS, 1.0)}
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SAVED = {"png": {}, "jpg": {"quality": 100, "subsampling": 0}, "tif": {}, "webp": {"lossless": True}}


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def convert(image: Image.Image, profile: bytes) -> np.ndarray:
    """Return the pixels in sRGB, by LittleCMS."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return values(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


def colors(side: int = 32) -> Image.Image:
    levels = np.linspace(0, 255, side).round().astype(np.uint8)
    red, green = np.meshgrid(levels, levels)
    return Image.fromarray(np.stack([red, green, red[::-1, ::-1] // 2 + green // 2], axis=-1))


@pytest.mark.parametrize(("name", "suffix"), itertools.product(PROFILES, SAVED))
def test_embedded_profiles_are_converted(tmp_path: Path, name: str, suffix: str) -> None:
    path, profile = tmp_path / f"a.{suffix}", PROFILES[name]
    colors().save(path, icc_profile=profile, **SAVED[suffix])
    expected = convert(Image.open(path).convert("RGB"), profile)
    assert np.array_equal(values(read_image(path)), expected)
    assert np.abs(expected - values(colors())).max() > 10


def test_the_profile_of_heic_is_converted(tmp_path: Path) -> None:
    profile = PROFILES["Display P3"]
    save_heic(scene(), tmp_path / "a.heic", icc_profile=profile)
    difference = np.abs(values(read_image(tmp_path / "a.heic")) - convert(scene(), profile))
    assert np.median(difference, axis=(0, 1)).max() <= 8


@pytest.mark.parametrize("suffix", SAVED)
def test_srgb_stays_as_it_is_with_and_without_its_profile(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    for options in ({}, {"icc_profile": SRGB_PROFILE}):
        colors().save(path, **SAVED[suffix], **options)
        assert np.array_equal(values(read_image(path)), values(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.4])
@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_gray_profiles_are_converted(tmp_path: Path, gamma: float, mode: str) -> None:
    gray, profile = colors().convert("L"), icc_profile(gamma=gamma)
    image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    stored = gray.convert(mode).convert("L") if mode != "I;16" else gray
    assert np.array_equal(values(read_image(tmp_path / "a.png")), convert(stored, profile))


def test_linear_gray_is_brightened_as_the_formula_says(tmp_path: Path) -> None:
    Image.new("L", (20, 20), 128).save(tmp_path / "a.png", icc_profile=icc_profile(gamma=1.0))
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(values(read_image(tmp_path / "a.png")) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_images_keep_their_opacity(tmp_path: Path, mode: str) -> None:
    profile, opacity = PROFILES["Display P3"], Image.new("L", (32, 32), 255)
    opacity.paste(0, (0, 0, 16, 32))
    cut_out = colors()
    cut_out.putalpha(opacity)
    cut_out.convert(mode).save(tmp_path / "a.png", icc_profile=profile)
    read = values(read_image(tmp_path / "a.png"))
    stored = Image.open(tmp_path / "a.png").convert("RGBA").convert("RGB")
    assert (read[:, :16] == 255).all() and np.array_equal(read[:, 16:], convert(stored, profile)[:, 16:])


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_the_profile_of_a_print_is_converted(tmp_path: Path, suffix: str) -> None:
    path, profile = tmp_path / f"a.{suffix}", cmyk_profile()
    colors().convert("CMYK").save(path, icc_profile=profile, **SAVED[suffix])
    stored = Image.open(path)
    assert stored.mode == "CMYK" and np.array_equal(values(read_image(path)), convert(stored, profile))
    assert np.abs(values(read_image(path)) - values(stored.convert("RGB"))).max() > 30


def test_cmyk_without_its_profile_is_left_to_pillow(tmp_path: Path) -> None:
    image = colors().convert("CMYK")
    image.save(tmp_path / "plain.jpg", quality=100)
    plain = Image.open(tmp_path / "plain.jpg")
    assert np.array_equal(values(read_image(tmp_path / "plain.jpg")), values(plain.convert("RGB")))
    image.save(tmp_path / "foreign.jpg", quality=100, icc_profile=PROFILES["Display P3"])  # for RGB
    assert np.array_equal(values(read_image(tmp_path / "foreign.jpg")), values(plain.convert("RGB")))


@pytest.mark.parametrize("profile", [b"", b"nonsense" * 30, PROFILES["Display P3"][:300], icc_profile(gamma=1.0),
                                     PROFILES["Adobe RGB"][:128] + b"\xff" * 400])
def test_profiles_that_are_damaged_or_for_other_images_are_ignored(tmp_path: Path, profile: bytes) -> None:
    colors().save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(values(read_image(tmp_path / "a.png")), values(colors()))


def test_lab_is_converted(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(scene(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                    outputMode="LAB")
    lab.save(tmp_path / "a.tif")
    assert np.abs(values(read_image(tmp_path / "a.tif")) - values(scene())).max() <= 3


def test_masks_are_numbers_and_no_colors(tmp_path: Path) -> None:
    levels = colors().convert("L")
    levels.save(tmp_path / "mask.png", icc_profile=icc_profile(gamma=1.0))
    assert np.array_equal(values(read_mask(tmp_path / "mask.png")), values(levels))


def test_images_in_memory_are_converted_as_files_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    scene().save(path, exif=exif, icc_profile=PROFILES["Display P3"], quality=95)
    opened = Image.open(path)
    assert np.array_equal(values(convert_image(opened)), values(read_image(path)))
    assert opened.size == (48, 32) and convert_image(opened).info == {}
    assert np.array_equal(values(convert_image(colors())), values(colors()))


# Colors that are described without a profile


def save_png(path: Path, image: Image.Image, **chunks: bytes) -> None:
    info = PngImagePlugin.PngInfo()
    for name, data in chunks.items():
        info.add(name.encode(), data)
    image.save(path, pnginfo=info)


def png_numbers(*numbers: float) -> bytes:
    return b"".join(round(number * 100_000).to_bytes(4, "big") for number in numbers)


def test_chunks_of_png_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for chunks, profile in ({"gAMA": png_numbers(1.0)}, PROFILES["linear"]), (
            {"gAMA": png_numbers(1 / 2.2), "cHRM": png_numbers(*DISPLAY_P3.points)}, matrix_profile(DISPLAY_P3)), (
            {"gAMA": png_numbers(256 / 563), "cHRM": png_numbers(*ADOBE_RGB.points)}, None):
        save_png(path, colors(), **chunks)
        read = values(read_image(path))
        assert np.abs(read - values(colors())).max() > 10
        if profile:
            assert np.abs(read - convert(colors(), profile)).max() <= 1


@pytest.mark.parametrize("chunks", [
    {"gAMA": png_numbers(0.45455)}, {"gAMA": png_numbers(0.45455), "cHRM": png_numbers(*SRGB.points)},
    {"sRGB": b"\0", "gAMA": png_numbers(1.0)}, {"gAMA": bytes(4)}, {"cHRM": bytes(32)}])
def test_chunks_that_mean_srgb_or_nothing_change_nothing(tmp_path: Path, chunks: dict[str, bytes]) -> None:
    save_png(tmp_path / "a.png", colors(), **chunks)
    assert np.array_equal(values(read_image(tmp_path / "a.png")), values(colors()))


@pytest.mark.parametrize(("primaries", "space"), [(12, DISPLAY_P3), (9, BT2020), (1, None), (2, None)])
def test_codes_of_heif_are_converted(tmp_path: Path, primaries: int, space: object) -> None:
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(scene()).save(path, format="HEIF", quality=100, chroma=444, save_nclx_profile=True,
                                          color_primaries=primaries, transfer_characteristics=13)
    expected = values(scene()) if space is None else convert(scene(), matrix_profile(space))
    assert np.median(np.abs(values(read_image(path)) - expected), axis=(0, 1)).max() <= 8


@pytest.mark.parametrize(("index", "changes"), [("R03", True), ("R98", False), ("", False)])
def test_the_camera_s_note_of_adobe_rgb_is_heeded(tmp_path: Path, index: str, changes: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    main = exif.get_ifd(0x8769)
    main[0xA001] = 0xFFFF
    main[0xA005] = {1: index}
    path = tmp_path / "_DSC0001.JPG"
    scene().save(path, exif=exif.tobytes(), quality=100, subsampling=0)
    stored = Image.open(path).convert("RGB")
    expected = convert(stored, PROFILES["Adobe RGB"]) if changes else values(stored)
    assert np.abs(values(read_image(path)) - expected).max() <= 1


def test_made_profiles_equal_those_of_the_standards() -> None:
    """Those of the standards are of the files that Apple and Adobe publish."""
    for space, columns in ((SRGB, SRGB_COLUMNS), (DISPLAY_P3, P3_COLUMNS), (ADOBE_RGB, ADOBE_COLUMNS)):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(matrix_profile(space))).profile
        made = (profile.red_colorant, profile.green_colorant, profile.blue_colorant)
        assert np.allclose([xyz for xyz, _ in made], columns, atol=3e-4)
    assert np.abs(convert(colors(), matrix_profile(SRGB)) - values(colors())).max() <= 1


def test_other_modes_are_left_to_pillow() -> None:
    for mode in ("L", "P", "CMYK", "YCbCr", "HSV", "1"):
        image = colors().convert(mode)
        assert np.array_equal(values(to_srgb(image)), values(image.convert("RGB")))
