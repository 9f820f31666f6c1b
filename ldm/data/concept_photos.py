"""The photos of one concept, with prompts and masks, as a training set (Perfusion, arXiv 2305.01644, section 4).

`ldm.personalization.cached_latents` turns them into the latents and weights that the loss reads.
"""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.crops import Square
from ldm.data.images import to_tensor
from ldm.data.templates import add_note, fill_template, get_templates
from ldm.data.training_photos import read_training_photos

PER_CONCEPT_PARAMS = ("data_root", "placeholder_token", "mask_root")


@dataclass(frozen=True)
class ConceptScene:
    """An image of the concept that is no photo.

    Attributes:
        image: RGB, of the training size.
        mask: (1, size, size) in [0, 1], where the concept is.
        caption: what it shows, with `{}` for the concept.
    """

    image: Image.Image
    mask: torch.Tensor
    caption: str


class ConceptPhotos(Dataset):
    """A few photos of a concept (1 to 20; more only cost memory), each used `repeats` times per epoch.

    Photos are decoded, cropped and resized once, and kept in memory as bytes. An item depends only on (`seed`, its
    index, the epoch). So neither the number of workers nor the global generators change a run.

    The crop is a square around the subject, once its mask is known: from `mask_root`, from a photo's transparent
    background, or from a segmenter, which `set_subject_masks` passes on. Until then, and without masks, it is the
    center.

    Items are dicts:
        image:   (3, size, size) float32 in [-1, 1]
        caption: str, a template filled with the placeholder
        mask:    (1, size, size) float32 in [0, 1]; all ones for a photo without a mask
        flipped: bool, whether image and mask are mirrored
        index:   int, the image's index in `images`

    If `with_pixels` is false, items have neither image nor mask: a model that has encoded every photo does not need
    them, and loading them takes most of the time.

    Args:
        data_root: folder of photos. A text file beside a photo (`cat.txt` for `cat.jpg`) says what else is in it, such
            as "next to a blue mug, on a table"; the photo's captions end with that.
        size: side of the square images, in pixels.
        repeats: how often each photo is used per epoch.
        flip_p: probability of a horizontal flip; 0 for a concept that must not be mirrored (asymmetric, lettering).
        placeholder_token: the word that stands for the concept in prompts, e.g. `<my-teddy>`.
        templates: name of a set in `ldm.data.templates`, or sentences with one `{}` each.
        mask_root: folder with one mask per photo, of the same name and aspect ratio (any image format; white counts).
        seed: seed of templates and flips.
        crop: "subject" for the square around the subject, "center" for the largest square in the center.

    Attributes:
        photos: the photos before they are cropped.
        images: the photos as training sees them, followed by the scenes of `add_scenes`.
        left_out: names of files in `data_root` that are not used, and why.

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
        crop: Literal["subject", "center"] = "subject",
    ) -> None:
        _check_params(size, repeats, flip_p, placeholder_token)
        self.size = size
        self.repeats = repeats
        self.flip_p = flip_p
        self.placeholder_token = placeholder_token
        self.templates = get_templates(templates)
        self.seed = seed
        self.with_pixels = True
        self.crop = crop
        self.left_out: dict[str, str] = {}
        self.photos = read_training_photos(data_root, size, mask_root, self.left_out)
        self._crop_photos()
        # In shared memory, so that workers that live through several epochs see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def _crop_photos(self) -> None:
        """Cut the squares that training sees out of the photos and their masks.

        Photos whose subject is outside of the square, as may be with center crops, are left out.
        """
        self.images: list[Image.Image] = []
        self._masks: list[torch.Tensor | None] = []
        self._squares: list[Square] = []
        self._notes: list[str] = []
        for photo in list(self.photos):
            square = photo.square(self.crop == "subject", self.size)
            mask = photo.cropped_mask(square, self.size)
            if mask is not None and not mask.any():
                self.left_out[photo.path.name] = "the subject is not in its center square"
                self.photos.remove(photo)
                continue
            self.images.append(square.crop(photo.image, self.size))
            self._masks.append(mask)
            self._squares.append(square)
            self._notes.append(photo.note)
        if not self.photos:
            raise UserError("crop: the subject is in no photo's center square; leave out --crop center")

    def cropped_shares(self) -> list[float]:
        """Return the share of each photo's area that is in its crop."""
        return [square.side**2 / (photo.image.width * photo.image.height)
                for square, photo in zip(self._squares, self.photos, strict=True)]

    def sizes(self, photo: int) -> torch.Tensor:
        """Return what SDXL is told of an image's size, plain and mirrored: (2, 6) float32, in pixels.

        The numbers are (height, width) of the original photo, (top, left) of the crop in the resized photo, and
        (height, width) of the crop.
        """
        if photo >= len(self.photos):  # a scene is not cropped
            return torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]] * 2, dtype=torch.float32)
        square, image = self._squares[photo], self.photos[photo].image
        width, height = self.photos[photo].original_size
        rows = []
        for mirrored in (False, True):
            rows.append((height, width, *square.corner(image.size, self.size, mirrored), self.size, self.size))
        return torch.tensor(rows, dtype=torch.float32)

    @property
    def scene_count(self) -> int:
        """The number of images that are no photos."""
        return len(self.images) - len(self.photos)

    @property
    def paths(self) -> list[Path]:
        """The files of the photos."""
        return [photo.path for photo in self.photos]

    def __len__(self) -> int:
        return len(self.images) * self.repeats

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str | bool | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        photo = self._image_of(index)
        # `random` hashes a text seed itself, so it gives the same numbers on every machine and in every process.
        rng = random.Random(f"{self.seed}/{int(self._epoch)}/{index}")
        template = rng.choice(self.templates)
        flipped = rng.random() < self.flip_p
        caption = fill_template(self._template(template, self._notes[photo]), self.placeholder_token)
        item = {"caption": caption, "flipped": flipped, "index": photo}
        if self.with_pixels:
            pixels = {"image": to_tensor(self.images[photo]), "mask": self.mask(photo)}
            item |= {name: tensor.flip(-1) if flipped else tensor for name, tensor in pixels.items()}
        return item

    def _image_of(self, index: int) -> int:
        """Return which image an item shows. If there are scenes, every other item is one."""
        photos, scenes = len(self.photos), self.scene_count
        if not scenes:
            return index % photos
        turn, is_scene = divmod(index, 2)
        return photos + turn % scenes if is_scene else turn % photos

    @property
    def prompts(self) -> list[str]:
        """All captions that items have, with `{}` in place of the placeholder."""
        notes = dict.fromkeys(self._notes)
        return list(dict.fromkeys(self._template(template, note) for template in self.templates for note in notes))

    def _template(self, template: str, note: str) -> str:
        return add_note(template, note, self.placeholder_token)

    @property
    def has_masks(self) -> bool:
        """Whether any photo has a mask."""
        return any(mask is not None for mask in self._masks)

    def mask(self, photo: int) -> torch.Tensor:
        """Return the mask (1, size, size) of a photo, not flipped; all ones if it has none."""
        mask = self._masks[photo]
        return torch.ones(1, self.size, self.size) if mask is None else mask.clone()

    def set_subject_masks(self, masks: Sequence[torch.Tensor | None]) -> None:
        """Set the masks of photos that have none yet, and crop anew. Call this before workers start.

        Photos whose subject is not found are left out, unless it is found in none.

        Args:
            masks: one for each photo, in the order of `photos`: (h, w) in [0, 1], of the whole photo in any resolution,
                or None if the photo keeps the mask that it has or the subject is not found in it.

        Raises:
            ValueError: there is not one mask for each photo, or a mask has another shape or range.
        """
        if len(masks) != len(self.photos):
            raise ValueError(f"{len(masks)} masks for {len(self.photos)} photos")
        for photo, mask in zip(self.photos, masks, strict=True):
            if mask is None:
                continue
            if mask.ndim != 2 or not bool(((mask >= 0) & (mask <= 1)).all()):
                raise ValueError(f"mask of {photo.path.name}: {tuple(mask.shape)}, not (h, w) in 0..1")
            photo.mask = Image.fromarray(mask.detach().cpu().float().numpy())
            photo.mask_source = "segmenter"
        without = [photo for photo in self.photos if photo.mask is None]
        if len(without) == len(self.photos):
            return
        self.left_out |= {photo.path.name: "the subject is not found in it" for photo in without}
        self.photos = [photo for photo in self.photos if photo.mask is not None]
        self._crop_photos()

    def add_scenes(self, scenes: Sequence[ConceptScene]) -> None:
        """Add images that are no photos, as often used as all photos together. Call this before workers start."""
        for scene in scenes:
            self.images.append(scene.image)
            self._masks.append(scene.mask)
            self._notes.append(scene.caption)

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
