"""Images in one style, under Textual Inversion's public path; see `ldm.data.personalized`."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ldm.data import imagenet_templates, personalized
from ldm.data.personalized import per_img_token_list

__all__ = ["PersonalizedBase", "imagenet_dual_templates_small", "imagenet_templates_small", "per_img_token_list"]

# The family's names
imagenet_templates_small = list(imagenet_templates.STYLE)
imagenet_dual_templates_small = list(imagenet_templates.STYLE_DUAL)


class PersonalizedBase(personalized.PersonalizedBase):
    """As `ldm.data.personalized.PersonalizedBase`, with captions such as "a painting in the style of *"."""

    templates: ClassVar[Sequence[str]] = imagenet_templates.STYLE
    dual_templates: ClassVar[Sequence[str]] = imagenet_templates.STYLE_DUAL

    def __init__(self, data_root: str | Path, size: int | None = None, repeats: int = 100,
                 interpolation: str = "bicubic", flip_p: float = 0.5, set: str = "train",
                 placeholder_token: str = "*", per_image_tokens: bool = False, center_crop: bool = False) -> None:
        super().__init__(data_root, size, repeats, interpolation, flip_p, set, placeholder_token, per_image_tokens,
                         center_crop)
