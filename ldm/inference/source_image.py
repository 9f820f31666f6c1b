"""The image that img2img and inpainting start from, its mask and its latents."""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.common.errors import UserError
from ldm.data.images import convert_image, crop_and_resize, largest_crop_size, read_image, to_tensor
from ldm.data.masks import binarize_mask, dilate_mask, feather_mask, mask_to_image, read_binary_mask, unmasked_cells

log = logging.getLogger(__name__)

IMG2IMG_STRENGTH, INPAINT_STRENGTH = 0.75, 1.0
BORDER_SHARE = 32  # the default border is one in this many pixels of the shorter side
ImageLike = Image.Image | str | Path


@dataclass(frozen=True)
class StartingLatents:
    """Encoded image that a sampler starts from instead of pure noise.

    Attributes:
        latents: (1, C, h, w), scaled as the U-Net sees them.
        strength: above 0 and up to 1; higher keeps less of the latents, and 1 ignores them.
        mask: (1, 1, h, w), 1 where the latents must stay as they are; None: nowhere.
    """

    latents: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class SourceImage:
    """An image to start from, cropped and resized to the size of the generated images.

    Attributes:
        image: RGB image of the generated size.
        strength: above 0 and up to 1; higher keeps less of the image, and 1 ignores it.
        mask: (1, 1, H, W) of zeros and ones, 1 where the image is regenerated; None: everywhere.
        border: width in pixels of the band around the mask in which the generated image blends into this one.
        name: its name in messages and metadata.
        original_size: (width, height) before cropping.
    """

    image: Image.Image
    strength: float
    mask: Tensor | None = None
    border: int = 0
    name: str = "image"
    original_size: tuple[int, int] = (0, 0)

    @classmethod
    def load(cls, image: ImageLike, size: tuple[int, int], strength: float) -> SourceImage:
        """Load an image and crop its middle to the proportions of `size`, (width, height); log what was cropped.

        Raises:
            UserError: the file cannot be read, or `strength` is not above 0 and at most 1.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength:g} must be above 0 and at most 1")
        name = "image" if isinstance(image, Image.Image) else str(image)
        photo = convert_image(image) if isinstance(image, Image.Image) else read_image(image)
        if photo.size != size:
            part = largest_crop_size(photo.size, *size)
            used = "all of it" if part == photo.size else f"its middle, {part[0]}x{part[1]},"
            log.info("%s, %dx%d: %s is used, at %dx%d", name, *photo.size, used, *size)
        return cls(crop_and_resize(photo, *size), strength, name=name, original_size=photo.size)

    @classmethod
    def load_with_mask(cls, image: ImageLike, size: tuple[int, int], strength: float | None = None,
                       mask: ImageLike | None = None, border: int | None = None) -> SourceImage:
        """Load an image, and the mask of the part to regenerate if there is one.

        Args:
            image, size: as for `load`.
            strength: None: 0.75, or 1 with a mask.
            mask: white where the image is regenerated; None: everywhere.
            border: width in pixels of the blend around the mask; None: 1/32 of the shorter side.

        Raises:
            UserError: a file cannot be read, or a number is out of range.
        """
        if mask is None and border is not None:
            raise UserError("mask_border acts on a mask_image; give one")
        if border is not None and border < 0:
            raise UserError(f"mask_border {border} must be 0 or more")
        default = IMG2IMG_STRENGTH if mask is None else INPAINT_STRENGTH
        source = cls.load(image, size, default if strength is None else strength)
        return source if mask is None else source.with_mask(source.read_mask(mask), border=border)

    def read_mask(self, mask: ImageLike) -> Tensor:
        """Return a mask (1, 1, H, W) of zeros and ones that is white where the image is to be regenerated.

        It has the proportions of the original image, or the size of the generated ones.

        Raises:
            UserError: the file cannot be read, has other proportions, or is black in the used part of the image.
        """
        if not isinstance(mask, Image.Image):
            return read_binary_mask(mask, self.original_size, *self.image.size)
        regenerate = binarize_mask(crop_and_resize(mask.convert("L"), *self.image.size))
        if not regenerate.any():
            raise UserError("mask_image: is black, so nothing would change; paint white what is to be regenerated")
        return regenerate

    def with_mask(self, mask: Tensor, grow: int = 0, border: int | None = None) -> SourceImage:
        """Return a copy of which only a part is regenerated.

        Args:
            mask: (1, 1, H, W) of zeros and ones.
            grow: pixels by which the ones are spread first.
            border: see the class; None: 1/32 of the shorter side.
        """
        width = min(self.image.size) // BORDER_SHARE if border is None else border
        return replace(self, mask=dilate_mask(mask, grow), border=width)

    @cached_property
    def weights(self) -> Tensor:
        """(1, 1, H, W) in [0, 1], how much of each pixel is regenerated; needs a mask."""
        return feather_mask(self.mask, self.border)

    def encode(self, model: Any, latent_size: tuple[int, int]) -> StartingLatents:
        """Encode the image; the latents that see nothing of the mask or its border stay as they are in sampling."""
        pixels = to_tensor(self.image)[None].to(model.betas.device)
        fixed = None if self.mask is None else unmasked_cells(self.weights, latent_size)
        return StartingLatents(model.encode_images(pixels, sample=False), self.strength, fixed)

    def composite(self, generated: Image.Image) -> Image.Image:
        """Return `generated` with this image's own pixels outside the mask and its border.

        The first stage does not reproduce its input exactly, so the pixels have to be put back.
        """
        if self.mask is None:
            return generated
        return Image.composite(generated, self.image, mask_to_image(self.weights))
