"""Sizes in pixels of a model whose first stage scales images down."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class KnowsPixelSizes:
    """Mixin for models of latents."""

    latent_shape: tuple[int, int, int]
    first_stage_model: Any
    num_downs: int

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of the images that latents of the model's own size decode to."""
        return self.pixels_of(self.latent_shape[1:])

    def pixels_of(self, latent_size: Sequence[int]) -> tuple[int, int]:
        """Return (height, width) of the images that latents of this height and width decode to."""
        height, width = latent_size
        encoder = getattr(self.first_stage_model, "encoder", None)
        factor = getattr(encoder, "patch_size", 1) * 2**self.num_downs
        return height * factor, width * factor
