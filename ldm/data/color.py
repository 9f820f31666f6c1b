"""Convert the colors of photos to sRGB, in which models were trained.

A file says in one of several ways what its numbers mean: by an ICC profile (phones: Display P3), by chunks of PNG, by
the codes of HEIF, or by a note of the camera (Adobe RGB). A file that says nothing is sRGB.
"""
from __future__ import annotations

import functools
import io
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm.data.matrix_profile import ADOBE_RGB, BT2020, DISPLAY_P3, SRGB, RGBSpace, matrix_profile

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

logger = logging.getLogger(__name__)

MODE_OF_PROFILE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of an ICC profile -> mode of Pillow
GRAY_MODES = ("1", "L", "LA", "La", "P", "PA")
OTHER_THAN_RGB = ("CMYK", "LAB")
TOLERANCE = 1  # of 255 levels: a profile that changes no color by more is sRGB under another name
STANDARD_GAMMA = 1 / 2.2
GAMMA_TOLERANCE = 0.01

NCLX_PRIMARIES = {12: DISPLAY_P3, 9: BT2020}  # codes of ITU-T H.273; others are close to sRGB
NCLX_CURVES = (1, 2, 6, 13, 14, 15)  # curves that screens show as sRGB; HDR is not among them
EXIF_COLOR_SPACE, EXIF_INTEROP, EXIF_MAIN = 0xA001, 0xA005, 0x8769
ADOBE_INTEROP = "R03"  # of the file system standard of cameras, DCF


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode with 8 bits as sRGB: as mode "RGB", or "RGBA" if it has transparency.

    A profile that is damaged, or for another kind of image, is ignored. The result has no metadata.
    """
    base = image.convert("RGBA") if image.has_transparency_data else image
    rgb = _convert(image) or base.convert("RGB")
    if image.has_transparency_data:
        rgb.putalpha(base.getchannel("A"))
    rgb.info = {}
    return rgb


def _convert(image: Image.Image) -> Image.Image | None:
    """Return the image in sRGB without transparency, or None if nothing is to be converted."""
    try:
        profile = image.info.get("icc_profile") or _implied_profile(image)
        if not profile:
            return None
        mode, transform = _transform_from(profile)
        if transform is None:
            return None
        source = _in_mode(image, mode)
        if source is None:
            logger.debug("color profile ignored: it is for %s, the image is %s", mode, image.mode)
            return None
        from PIL import ImageCms

        return ImageCms.applyTransform(source, transform)
    except Exception as error:  # profiles and metadata hold arbitrary bytes; parsers raise many kinds of errors
        logger.debug("color profile ignored: %s", error)
        return None


def _in_mode(image: Image.Image, mode: str) -> Image.Image | None:
    """Return an image in the mode that a profile is for; None if the profile is for another kind of image."""
    if mode == "L":
        return image.convert("L") if image.mode in GRAY_MODES else None
    if mode == "RGB" and image.mode not in OTHER_THAN_RGB:
        return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")
    return image if image.mode == mode else None


@functools.lru_cache(maxsize=8)
def _transform_from(profile: bytes) -> tuple[str, ImageCmsTransform | None]:
    """Return the mode that an ICC profile is for, and the transform to sRGB; None if it would change nothing."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = MODE_OF_PROFILE.get(source.profile.xcolor_space.strip(), "")
    if not mode:
        return mode, None
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        colors = _sample_colors(mode)
        change = np.asarray(ImageCms.applyTransform(colors, transform), int) - np.asarray(colors.convert("RGB"), int)
        if np.abs(change).max() <= TOLERANCE:
            return mode, None
    return mode, transform


def _sample_colors(mode: str) -> Image.Image:
    """Return an image of all grays or of colors from the whole cube."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3))


# Colors that are described by other things than a profile


def _implied_profile(image: Image.Image) -> bytes | None:
    space = _space_of_png(image.info) or _space_of_heif(image.info) or _space_of_camera(image)
    return None if space is None else matrix_profile(space)


def _space_of_png(info: dict[Any, Any]) -> RGBSpace | None:
    """Return what the chunks gAMA and cHRM of a PNG file say; the chunk sRGB overrides them."""
    if "srgb" in info or not ("gamma" in info or "chromaticity" in info):
        return None
    gamma = float(info.get("gamma", STANDARD_GAMMA))
    points = tuple(map(float, info.get("chromaticity", ()))) or SRGB.points
    return RGBSpace(points, None if abs(gamma - STANDARD_GAMMA) < GAMMA_TOLERANCE else 1 / gamma)


def _space_of_heif(info: dict[Any, Any]) -> RGBSpace | None:
    codes = info.get("nclx_profile") or {}
    if codes.get("transfer_characteristics") not in NCLX_CURVES:
        return None
    return NCLX_PRIMARIES.get(codes.get("color_primaries"))


def _space_of_camera(image: Image.Image) -> RGBSpace | None:
    """Return Adobe RGB if the camera notes it; cameras embed no profile."""
    if image.mode in OTHER_THAN_RGB or "exif" not in image.info:
        return None
    exif = image.getexif()
    is_uncalibrated = exif.get_ifd(EXIF_MAIN).get(EXIF_COLOR_SPACE) in (2, 0xFFFF)
    interop = str(exif.get_ifd(EXIF_INTEROP).get(1, "")).strip("\0")
    return ADOBE_RGB if is_uncalibrated and interop == ADOBE_INTEROP else None
