"""The photos of a concept under Textual Inversion's public path, as that repository and its forks read them.

Methods of this project train on `ldm.data.concept_photos.ConceptPhotos`, with masks and repeatable captions.
"""
from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data import imagenet_templates
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.pixel_arrays import PixelArrays

TEXTUAL_INVERSION_PARAMS = frozenset({
    "set", "per_image_tokens", "interpolation", "center_crop", "mixing_prob", "coarse_class_text", "reg"})
INTERPOLATION_POSITION = 3

# The family's names
per_img_token_list = imagenet_templates.PER_IMAGE_TOKENS
imagenet_templates_smallest = ["a photo of a {}"]
imagenet_templates_small = list(imagenet_templates.SUBJECT)
imagenet_dual_templates_small = list(imagenet_templates.SUBJECT_DUAL)


class _ChoosesConceptPhotos(Dataset):
    """Makes `PersonalizedBase(...)` a `ConceptPhotos` unless a param is Textual Inversion's alone.

    Configs of both kinds name `PersonalizedBase`. Subclasses of it are what they say.
    """

    def __new__(cls, *args: Any, **params: Any) -> Any:
        is_unpickled = not args and not params
        if cls is PersonalizedBase and not is_unpickled and not _are_textual_inversion_params(args, params):
            return ConceptPhotos(*args, **params)
        return super().__new__(cls)


class PersonalizedBase(_ChoosesConceptPhotos):
    """Photos with random captions, for Textual Inversion and DreamBooth as their public scripts train them.

    Without a param that only these have, such as `set`, the result is a `ConceptPhotos`.

    Items are dicts: `image` (H, W, 3) float32 in [-1, 1], and `caption`. The global generators of `random` (caption),
    NumPy (per-image tokens) and torch (flip) choose them, in this order, so that a seed gives what it gives there.

    Args:
        data_root: folder of photos, read in the order in which the system lists it.
        size: side of the square images, in pixels; None keeps the photos' sizes.
        repeats: how often each photo is used per epoch, if `set` is "train".
        interpolation: "linear", "bilinear", "bicubic" or "lanczos".
        flip_p: probability of a horizontal flip.
        set: "train", or anything else for each photo once.
        placeholder_token: the concept's word in captions.
        per_image_tokens: whether some captions have a word of their photo's own as well, from `per_img_token_list`.
        center_crop: whether to crop the largest square; otherwise photos are squeezed to one.
        mixing_prob: share of the captions with a word of the photo's own.
        coarse_class_text: text before the placeholder, the concept's class.
        reg: for DreamBooth, whether these are the images of the class (True) or the subject's photos (False), whose
            captions have the identifier "sks". None: Textual Inversion.
        templates, mask_root, seed: params of `ConceptPhotos`.

    Raises:
        UserError: there are no photos or too many for per-image tokens, or the params contradict each other.
    """

    templates: ClassVar[Sequence[str]] = imagenet_templates.SUBJECT
    dual_templates: ClassVar[Sequence[str]] = imagenet_templates.SUBJECT_DUAL

    def __init__(self, data_root: str | Path, size: int | None = None, repeats: int = 100,
                 interpolation: str = "bicubic", flip_p: float = 0.5, set: str = "train",
                 placeholder_token: str = "*", per_image_tokens: bool = False, center_crop: bool = False,
                 mixing_prob: float = 0.25, coarse_class_text: str | None = None, reg: bool | None = None,
                 templates: str | Sequence[str] | None = None, mask_root: str | Path | None = None,
                 seed: int | None = None) -> None:
        if templates is not None or mask_root is not None or seed is not None:
            raise UserError("templates, mask_root and seed do not go with set, per_image_tokens and other params of "
                            "Textual Inversion's photos; leave out one kind")
        self.data_root = data_root
        self.image_paths = _list_files(data_root)
        self.num_images = len(self.image_paths)
        if per_image_tokens and self.num_images >= len(per_img_token_list):
            raise UserError(f"per_image_tokens: there are words for {len(per_img_token_list) - 1} photos, not for "
                            f"{self.num_images}; give fewer photos, or leave it out")
        self._length = self.num_images * (repeats if set == "train" else 1)
        self.placeholder_token = placeholder_token
        self.per_image_tokens, self.mixing_prob = per_image_tokens, mixing_prob
        self.coarse_class_text = coarse_class_text
        self.reg = reg
        self.size, self.center_crop = size, center_crop
        self.read_pixels = PixelArrays(size, interpolation, flip_p, center_crop)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        photo = i % self.num_images
        return {"caption": self._draw_caption(photo), "image": self.read_pixels(self.image_paths[photo])}

    def _draw_caption(self, photo: int) -> str:
        word = self.placeholder_token
        if self.coarse_class_text:
            word = f"{self.coarse_class_text} {word}"
        if self.reg is not None:
            templates = imagenet_templates.REGULARIZATION if self.reg else imagenet_templates.DREAMBOOTH
            return random.choice(templates).format(word)
        if self.per_image_tokens and np.random.uniform() < self.mixing_prob:
            return random.choice(self.dual_templates).format(word, per_img_token_list[photo])
        return random.choice(self.templates).format(word)


def _are_textual_inversion_params(args: Sequence[Any], params: Mapping[str, Any]) -> bool:
    has_interpolation = len(args) > INTERPOLATION_POSITION and isinstance(args[INTERPOLATION_POSITION], str)
    return has_interpolation or not TEXTUAL_INVERSION_PARAMS.isdisjoint(params)


def _list_files(folder: str | Path) -> list[str]:
    """Return the paths of a folder's files, but hidden ones, in the order in which the system lists them."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give the folder that holds the photos") from None
    paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise UserError(f"{folder}: no photos in this folder; put some there")
    return paths
