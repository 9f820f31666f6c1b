"""Decode image files of every format that Pillow and its plugins read, upright and with 8 bits per channel."""
from __future__ import annotations

import functools
import importlib
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldm.common.errors import UserError
from ldm.common.paths import user_path
from ldm.data.file_kinds import RAW, foreign_kind, is_heif, is_jxl, read_header

logger = logging.getLogger(__name__)

MIN_SIDE = 16
MAX_PIXELS = 80_000_000  # below Pillow's own warning; decoded, such a photo takes a quarter of a gigabyte
LEVELS_OF_16_BITS = 65535
COMMON_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")  # of formats that Pillow reads without its many plugins
NEVER_READ = frozenset(("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"))  # need other programs, or hold no pixels
ANIMATED = frozenset(("GIF", "PNG", "WEBP", "AVIF", "TIFF", "FLI"))  # others hold depth maps, layers or sizes
JXL_PLUGINS = ("pillow_jxl", "jxlpy.JXLImagePlugin")
DNG_VERSION, SUBFILE_TYPE, SUB_IFDS = 50706, 254, 330  # TIFF tags
KEPT_INFO = ("icc_profile", "gamma", "chromaticity", "srgb")  # what the colors of a file mean


def decode_image(path: str | Path) -> Image.Image:
    """Return the upright image of a file, fully read, in the mode of the file; "L" if it has more than 8 bits.

    Of an animation or a document, this is the first frame or page; a log line says so.

    Raises:
        UserError: the file is missing, no image, cut off, smaller than 16 pixels on a side or far too large.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        opened = open_image(path)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: far too many pixels; save it smaller") from None
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise _unreadable(path, error) from None
    with opened:
        _check_size(path, *opened.size)
        try:
            has_more = opened.format in ANIMATED and getattr(opened, "is_animated", False)
            opened.load()
        except Exception as error:  # as above
            raise _unreadable(path, error) from None
        if has_more:
            _note_first_frame(path)
        return to_8_bits(turn_upright(opened))


def open_image(path: Path) -> Image.Image:
    """Open an image file, by its content and not by its suffix, without decoding it.

    Raises:
        UserError: the file is of a known kind that cannot be read here.
        Exception: of any kind, if it is no image or damaged.
    """
    header = read_header(path)
    kind = foreign_kind(header)
    if kind is not None:
        raise UserError(kind if kind == RAW else f"not an image: {kind}")
    _load_plugins(header)
    # Formats without a beginning of their own take almost any file for theirs, so they need the suffix.
    by_suffix = Image.EXTENSION.get(path.suffix.lower())
    formats = [name for name in Image.ID
               if name not in NEVER_READ and (Image.OPEN[name][1] is not None or name == by_suffix)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size, for which _check_size has the better message, and missing codecs
        opened = Image.open(path, formats=formats)
    if _is_raw(opened):
        opened.close()
        raise UserError(RAW)
    return opened


def can_open(path: Path) -> bool:
    """Return whether the content of a file is an image, perhaps a damaged one. Its suffix does not count."""
    try:
        open_image(path).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # decoders raise almost anything
        return False
    return True


def turn_upright(image: Image.Image) -> Image.Image:
    """Return a copy without the rotation that the camera noted in its EXIF block. A damaged block is ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # the block holds arbitrary bytes, and Pillow's parser raises many kinds of errors
        logger.debug("EXIF of %s ignored: %s", getattr(image, "filename", "an image"), error)
    return image.copy()


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray images of 16 or 32 bits, or of floats, to mode "L"; return others as they are.

    Pillow's own conversion clips instead of scaling.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    levels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    white = _white_level(image.mode, float(levels.max(initial=0)))
    result = Image.fromarray(np.clip(levels / (white / 255), 0, 255).round().astype(np.uint8))
    result.info = {key: image.info[key] for key in KEPT_INFO if key in image.info}
    return result


def _white_level(mode: str, highest: float) -> float:
    """Return the value of white: files of floats or of 32 bits do not say which it is."""
    usual = (1.0, 255.0, LEVELS_OF_16_BITS) if mode == "F" else (LEVELS_OF_16_BITS,)
    return next((level for level in usual if highest <= level), highest)


def _load_plugins(header: bytes) -> None:
    """Load Pillow's plugins as far as a file that begins so needs them; those beyond the common ones take a while.

    Raises:
        UserError: a plugin that is not a part of Pillow is missing.
    """
    if header.startswith(COMMON_BEGINNINGS):
        Image.preinit()
        return
    Image.init()
    if is_heif(header) and "HEIF" not in Image.OPEN:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            raise UserError("HEIC, for which a package is missing; install it with `pip install pillow-heif`") from None
    if is_jxl(header) and "JXL" not in Image.OPEN and not any(map(_import_if_installed, JXL_PLUGINS)):
        raise UserError("JPEG XL, for which a package is missing; install it with `pip install pillow-jxl-plugin`")


def _import_if_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _is_raw(image: Image.Image) -> bool:
    """Return whether Pillow took a camera's RAW file for a TIFF. It would read the preview, of 160 x 120 pixels."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    return tags is not None and (DNG_VERSION in tags or (tags.get(SUBFILE_TYPE) == 1 and SUB_IFDS in tags))


@functools.lru_cache(maxsize=1024)
def _note_first_frame(path: Path) -> None:
    """Log once for each file that only its first frame is used."""
    logger.warning("%s: has several frames or pages; the first is used", path)


def _unreadable(path: Path, error: Exception) -> UserError:
    """Return the error to report; the text of a UserError may have a remedy after a semicolon."""
    reason, remedy = " ".join(str(error).split()), ""
    if isinstance(error, UserError):
        reason, _, remedy = reason.partition("; ")
    elif isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image"
    return UserError(f"{path}: cannot be read ({reason}); {remedy or 'copy or save it again as JPEG or PNG'}")


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{path}: {width}x{height} is too small; use one of at least {MIN_SIDE} pixels a side")
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width}x{height} is too large; save it with under {MAX_PIXELS // 10**6} megapixels")
