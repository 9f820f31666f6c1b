"""The photos of one concept, with prompts and masks, as a training set (Perfusion, arXiv 2305.01644, section 4).

`ldm.personalization.cached_latents` turns them into the latents and weights that the loss reads.
"""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.images import check_aspect_ratio, crop_square, list_images, read_folder, read_mask, to_tensor
from ldm.data.templates import fill_template, get_templates

PER_CONCEPT_PARAMS = ("data_root", "placeholder_token", "mask_root")


class ConceptPhotos(Dataset):
    """A few photos of a concept (1 to 20; more only cost memory), each used `repeats` times per epoch.

    Photos are decoded, cropped to their center square and resized once, and kept in memory as bytes. An item depends
    only on (`seed`, its index, the epoch). So neither the number of workers nor the global generators change a run.

    Items are dicts:
        image:   (3, size, size) float32 in [-1, 1]
        caption: str, a template filled with the placeholder
        mask:    (1, size, size) float32 in [0, 1]; all ones unless `mask_root` or `set_masks` give masks
        flipped: bool, whether image and mask are mirrored
        index:   int, the photo's index in `paths`

    If `with_pixels` is false, items have neither image nor mask: a model that has encoded every photo does not need
    them, and loading them takes most of the time.

    Args:
        data_root: folder of photos (jpg, jpeg, png, webp, bmp). A warning names files that cannot be read.
        size: side of the square images, in pixels.
        repeats: how often each photo is used per epoch.
        flip_p: probability of a horizontal flip; 0 for a concept that must not be mirrored (asymmetric, lettering).
        placeholder_token: the word that stands for the concept in prompts, e.g. `<my-teddy>`.
        templates: name of a set in `ldm.data.templates`, or sentences with one `{}` each.
        mask_root: folder with one mask per photo, of the same name and aspect ratio (any image format; white counts).
        seed: seed of templates and flips.

    Raises:
        UserError: no usable photo, a photo without a mask, or a param out of its range.
    """

    def __init__(
        self,
        data_root: str | Path,
        size: int = 512,
        repeats: int = 100,
        flip_p: float = 0.5,
        placeholder_token: str = "*",
        templates: str | Sequence[str] = "photo",
        mask_root: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        _check_params(size, repeats, flip_p, placeholder_token)
        self.size = size
        self.repeats = repeats
        self.flip_p = flip_p
        self.placeholder_token = placeholder_token
        self.templates = get_templates(templates)
        self.seed = seed
        self.with_pixels = True
        self.paths: list[Path] = []
        self.images: list[Image.Image] = []
        sizes: list[tuple[int, int]] = []
        for path, photo in read_folder(data_root):
            self.paths.append(path)
            self.images.append(crop_square(photo, size))
            sizes.append(photo.size)
        self._masks = None if mask_root is None else _read_masks(mask_root, self.paths, sizes, size)
        # In shared memory, so that workers that live through several epochs see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.paths) * self.repeats

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str | bool | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        photo = index % len(self.paths)
        # `random` hashes a text seed itself, so it gives the same numbers on every machine and in every process.
        rng = random.Random(f"{self.seed}/{int(self._epoch)}/{index}")
        template = rng.choice(self.templates)
        flipped = rng.random() < self.flip_p
        item = {"caption": fill_template(template, self.placeholder_token), "flipped": flipped, "index": photo}
        if self.with_pixels:
            pixels = {"image": to_tensor(self.images[photo]), "mask": self.mask(photo)}
            item |= {name: tensor.flip(-1) if flipped else tensor for name, tensor in pixels.items()}
        return item

    @property
    def has_masks(self) -> bool:
        """Whether `mask_root` or `set_masks` gave masks."""
        return self._masks is not None

    def mask(self, photo: int) -> torch.Tensor:
        """Return the mask (1, size, size) of a photo, not flipped; all ones if there are no masks."""
        return torch.ones(1, self.size, self.size) if self._masks is None else self._masks[photo].clone()

    def set_masks(self, masks: Sequence[torch.Tensor]) -> None:
        """Set the photos' masks. Call this before workers start.

        Args:
            masks: one per photo, in the order of `paths`: (1, size, size) in [0, 1].

        Raises:
            ValueError: not one mask per photo, or a mask has another shape or range.
        """
        if len(masks) != len(self.paths):
            raise ValueError(f"{len(masks)} masks for {len(self.paths)} photos")
        for path, mask in zip(self.paths, masks, strict=True):
            if mask.shape != (1, self.size, self.size) or not bool(((mask >= 0) & (mask <= 1)).all()):
                raise ValueError(f"mask of {path.name}: {tuple(mask.shape)}, not (1, {self.size}, {self.size}) in 0..1")
        self._masks = [mask.detach().cpu().float().clone() for mask in masks]

    def set_epoch(self, epoch: int) -> None:
        """Choose the templates and flips of `epoch` from now on. Loaders call it when an epoch starts."""
        self._epoch.fill_(epoch)


def split_concept_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Split the config of a training set into one per concept, if its param `data_root` lists several folders.

    Each of these has one of the folders, and one of the values of `placeholder_token` and `mask_root`. The other params
    are shared.

    Raises:
        UserError: there are not as many placeholders or mask folders as folders.
    """
    params = config.get("params") or {}
    if not any(isinstance(params.get(name), list) for name in PER_CONCEPT_PARAMS):
        return [config]
    lists: dict[str, list[Any]] = {}
    for name in PER_CONCEPT_PARAMS:
        if params.get(name) is not None:
            lists[name] = params[name] if isinstance(params[name], list) else [params[name]]
    count = len(lists.get("data_root", ()))
    for name, values in lists.items():
        if len(values) != count:
            raise UserError(f"{name}: {len(values)} of them ({', '.join(map(str, values))}) for {count} folders of "
                            "photos (data_root); give one for each")
    configs = []
    for index in range(count):
        own = {name: values[index] for name, values in lists.items()}
        configs.append({**config, "params": {**params, **own}})
    return configs


def _check_params(size: int, repeats: int, flip_p: float, placeholder_token: str) -> None:
    if size < 8:
        raise UserError(f"size: {size} pixels make no image; give the size that the base model works at, e.g. 512")
    if repeats < 1:
        raise UserError(f"repeats: {repeats} leaves no training data; give 1 or more")
    if not 0 <= flip_p <= 1:
        raise UserError(f"flip_p: {flip_p} is not a probability; give a number from 0 to 1")
    if not placeholder_token.strip():
        raise UserError("placeholder_token is empty; give the concept a word such as <my-teddy>")


def _read_masks(
    folder: str | Path, photos: Sequence[Path], photo_sizes: Sequence[tuple[int, int]], size: int
) -> list[torch.Tensor]:
    """Read one mask (1, size, size) per photo, found by the name of the photo's file."""
    by_name = {path.stem: path for path in list_images(folder)}
    missing = [photo.name for photo in photos if photo.stem not in by_name]
    if missing:
        raise UserError(f"{folder}: no mask for {', '.join(missing)}; add one of the same name, or drop mask_root")
    return [_read_mask(by_name[photo.stem], photo_size, size)
            for photo, photo_size in zip(photos, photo_sizes, strict=True)]


def _read_mask(path: Path, photo_size: tuple[int, int], size: int) -> torch.Tensor:
    """Read a mask, crop it as its photo is cropped, and scale its maximum to 1. Returns (1, size, size)."""
    mask = read_mask(path)
    check_aspect_ratio(path, mask.size, photo_size)
    levels = torch.from_numpy(np.array(crop_square(mask, size))).float()
    if not levels.max() > 0:
        raise UserError(f"{path}: black where the photo is used (its center square); paint the concept white")
    return (levels / levels.max())[None]
