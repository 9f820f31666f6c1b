"""Photos as people have them: read safely, turned upright, and cropped; images as tensors and back."""
from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".tif", ".tiff")  # images, but none that we read
MIN_SIDE = 16
MAX_PIXELS = 80_000_000  # below Pillow's own warning; decoded, such a photo takes a quarter of a gigabyte
ASPECT_TOLERANCE = 0.02  # rounding to whole pixels changes the aspect ratio of a small mask by as much
OPAQUE = 255


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as upright RGB with 8 bits per channel. Transparent parts become white.

    Raises:
        UserError: the file is missing, no image, cut off, smaller than 16 pixels on a side or far too large.
    """
    return _to_rgb(_decode(Path(path)))


def read_mask(path: str | Path) -> Image.Image:
    """Read a mask file as an upright image of mode "L": white counts in full, black not at all.

    If any part of the image is transparent (a cut-out), the mask is its opacity instead of its brightness.

    Raises:
        UserError: as for `read_image`.
    """
    image = _decode(Path(path))
    opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if opacity is None or opacity.getextrema()[0] == OPAQUE:  # many programs save an alpha channel that is all opaque
        return _to_rgb(image).convert("L")
    return opacity


def check_aspect_ratio(path: str | Path, mask_size: tuple[int, int], photo_size: tuple[int, int]) -> None:
    """Raise UserError if the mask at `path` does not have the aspect ratio of its photo.

    Args:
        path: the mask's file, for the message.
        mask_size: (width, height) of the mask.
        photo_size: (width, height) of the photo.
    """
    (mask_width, mask_height), (width, height) = mask_size, photo_size
    if abs(mask_width * height / (mask_height * width) - 1) > ASPECT_TOLERANCE:
        raise UserError(f"{path}: {mask_width}x{mask_height} does not fit its photo, {width}x{height}; "
                        "draw it over all of the photo")


def list_images(folder: str | Path) -> list[Path]:
    """List the image files directly in `folder`, sorted by name. Hidden files and subfolders are left out.

    A relative path that does not exist is also looked for under the project's root.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    folder = resolve_path(Path(folder).expanduser())
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the images")
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); allow it, or copy the images elsewhere"
                        ) from None
    unread = [path.name for path in files if path.suffix.lower() in UNREAD_SUFFIXES]
    if unread:
        logger.warning("%s: left out %s; save them as JPEG or PNG to use them", folder, ", ".join(unread))
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(f"{folder}: no images in this folder; put {', '.join(SUFFIXES)} files there")
    return paths


def read_folder(folder: str | Path) -> Iterator[tuple[Path, Image.Image]]:
    """Read the images of `folder` with `read_image`, one in memory at a time.

    A warning names each file that cannot be used.

    Yields:
        The path and the image of each usable file, in the order of `list_images`.

    Raises:
        UserError: as for `list_images`, or none of the files can be used.
    """
    refused: list[UserError] = []
    usable = 0
    for path in list_images(folder):
        try:
            image = read_image(path)
        except UserError as error:
            refused.append(error)
            continue
        usable += 1
        yield path, image
    if not usable:
        more = f"; {len(refused) - 1} more likewise" if len(refused) > 1 else ""
        raise UserError(f"{folder}: none of its images can be used: {refused[0]}{more}")
    for error in refused:
        logger.warning("left out %s", error)


def load_folder(folder: str | Path) -> list[tuple[Path, Image.Image]]:
    """Return all that `read_folder` yields, as a list. Raises the same errors."""
    return list(read_folder(folder))


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """Crop the largest square in the center of `image` and resize it (Lanczos) to `size` x `size` pixels."""
    return crop_and_resize(image, size, size)


def crop_and_resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop the largest part in the center that has the aspect ratio of width x height, and resize it to that size.

    `ImageOps.fit` crops at fractions of a pixel, which blurs an image that needs no resizing. This crops whole pixels.
    """
    crop_width, crop_height = largest_crop_size(image.size, width, height)
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def largest_crop_size(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Return the size of the largest crop of an image that has the aspect ratio of width x height.

    Args:
        size: (width, height) of the image.
        width: width of the wanted aspect ratio.
        height: height of the wanted aspect ratio.
    """
    image_width, image_height = size
    if image_width * height < image_height * width:
        return image_width, max(1, round(image_width * height / width))
    return max(1, round(image_height * width / height)), image_height


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to a float32 tensor (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.movedim(-1, 0).contiguous().float().div(127.5).sub(1)


def from_tensor(pixels: torch.Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) to an RGB image. Values outside of [-1, 1] are clamped."""
    levels = pixels.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(levels.movedim(0, -1).contiguous().numpy())


def _decode(path: Path) -> Image.Image:
    """Return the upright image, fully read, in the mode of its file; mode "L" if the file has 16 bits per channel."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size gives the better message
            opened = Image.open(path)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: far too many pixels; save it smaller") from None
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise _unreadable(path, error) from None
    with opened:
        _check_size(path, *opened.size)
        try:
            opened.load()
        except Exception as error:  # as above
            raise _unreadable(path, error) from None
        return _to_8_bits(_turn_upright(opened))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
    return UserError(f"{path}: cannot be read ({reason}); copy or save it again as JPEG or PNG")


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{path}: {width}x{height} is too small; use one of at least {MIN_SIDE} pixels a side")
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width}x{height} is too large; save it with under {MAX_PIXELS // 10**6} megapixels")


def _turn_upright(image: Image.Image) -> Image.Image:
    """Return a copy without the rotation that the camera noted in its EXIF block. A damaged block is ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # the block holds arbitrary bytes, and Pillow's parser raises many kinds of errors
        logger.debug("EXIF of %s ignored: %s", getattr(image, "filename", "an image"), error)
    return image.copy()


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale an image with 16 bits per channel to mode "L". (Pillow's own conversion clips instead of scaling.)"""
    if not image.mode.startswith("I"):
        return image
    levels = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255)
    return Image.fromarray(levels.round().astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, on white where the image is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
