"""Photos as people have them: read safely, turned upright, and cropped; images as tensors and back."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.data.color import to_srgb
from ldm.data.decoding import can_open, decode_image, to_8_bits, turn_upright
from ldm.data.file_kinds import IMAGE_SUFFIXES, RAW_SUFFIXES, describe_file

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
MOST_NAMED = 20  # files in one line of the log
ASPECT_TOLERANCE = 0.02  # rounding to whole pixels changes the aspect ratio of a small mask by as much
OPAQUE = 255


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as upright RGB with 8 bits per channel, in sRGB. Transparent parts become white.

    The content decides what it is, not the suffix. Of an animation, the first frame is read.

    Raises:
        UserError: the file is missing, no image, cut off, smaller than 16 pixels on a side or far too large.
    """
    return _on_white(to_srgb(decode_image(path)))


def convert_image(image: Image.Image) -> Image.Image:
    """Convert an image in memory as `read_image` converts a file's; it may be one that `Image.open` returned."""
    return _on_white(to_srgb(to_8_bits(turn_upright(image.copy()))))


def read_mask(path: str | Path) -> Image.Image:
    """Read a mask file as an upright image of mode "L": white counts in full, black not at all.

    If any part of the image is transparent (a cut-out), the mask is its opacity instead of its brightness. Its numbers
    are no colors, so a color profile does not change them.

    Raises:
        UserError: as for `read_image`.
    """
    image = decode_image(path)
    opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if opacity is None:
        return image.convert("RGB").convert("L")
    # Many programs save an alpha channel that is all opaque.
    return image.convert("RGBA").convert("RGB").convert("L") if opacity.getextrema()[0] == OPAQUE else opacity


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


@dataclass(frozen=True)
class FolderContent:
    """What a folder of images holds.

    Attributes:
        folder: its path.
        images: files that are images by their suffix or their content, sorted by name.
        left_out: the names of all others and what they are, such as "a video". Hidden files, and texts that have the
            name of an image, are in neither.
    """

    folder: Path
    images: Sequence[Path]
    left_out: dict[str, str] = field(default_factory=dict)

    def describe_left_out(self) -> str:
        """Name the files that are left out, in one line; the first 20 of many."""
        return describe_files(self.left_out)


def describe_files(reasons: Mapping[str, str]) -> str:
    """Name files with a reason for each, in one line; the first 20 of many."""
    named = [f"{name} ({reason})" for name, reason in list(reasons.items())[:MOST_NAMED]]
    more = len(reasons) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def scan_folder(folder: str | Path) -> FolderContent:
    """Tell apart the images directly in `folder` and everything else there. Only files with other suffixes are opened.

    A relative path that does not exist is also looked for under the project's root.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    folder = resolve_path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the images")
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); allow it, or copy the images elsewhere"
                        ) from None
    images = [path for path in entries if path.is_file() and _is_image(path)]
    captions = {f"{name}{CAPTION_SUFFIX}" for path in images for name in (path.stem, path.name)}
    used = captions | {path.name for path in images}
    left_out = {path.name: describe_file(path) for path in entries if path.name not in used}
    return FolderContent(folder, images, left_out)


def list_images(folder: str | Path, left_out: dict[str, str] | None = None) -> list[Path]:
    """List the image files directly in `folder`, sorted by name.

    Args:
        folder: the folder.
        left_out: takes the names of all other files and what they are. None: a warning names them, in one line.

    Raises:
        UserError: as for `scan_folder`, or there is no image in it.
    """
    content = scan_folder(folder)
    if not content.images:
        others = f", only {content.describe_left_out()}" if content.left_out else ""
        raise UserError(f"{content.folder}: no images in this folder{others}; put photos there, such as JPEG, PNG or "
                        "HEIC files")
    if left_out is not None:
        left_out |= content.left_out
    elif content.left_out:
        logger.warning("%s: left out %s", content.folder, content.describe_left_out())
    return list(content.images)


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix not in RAW_SUFFIXES and can_open(path))


def read_folder(folder: str | Path, left_out: dict[str, str] | None = None) -> Iterator[tuple[Path, Image.Image]]:
    """Read the images of `folder` with `read_image`, one in memory at a time.

    Args:
        folder: the folder.
        left_out: takes the names of all files that are not used, and why. None: a warning names each.

    Yields:
        The path and the image of each usable file, in the order of `list_images`.

    Raises:
        UserError: as for `list_images`, or none of the files can be used.
    """
    refused: list[UserError] = []
    usable = 0
    for path in list_images(folder, left_out):
        try:
            image = read_image(path)
        except UserError as error:
            refused.append(error)
            if left_out is not None:
                left_out[path.name] = str(error).removeprefix(f"{path}: ")
            continue
        usable += 1
        yield path, image
    if not usable:
        more = f"; {len(refused) - 1} more likewise" if len(refused) > 1 else ""
        raise UserError(f"{folder}: none of its images can be used: {refused[0]}{more}")
    if left_out is None:
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


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image of mode "RGB" or "RGBA" as RGB, on white where it is transparent."""
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
