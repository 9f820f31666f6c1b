"""Show what training will see of a run's photos, before it starts: crops, masks, and what is left out."""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.mask_files import read_painted_mask
from ldm.data.training_photos import TrainingPhoto
from ldm.inference.model_config import model_setting
from ldm.modules.segmentation import mask_overlay
from ldm.personalization.photo_masks import make_missing_masks
from ldm.web.run_folder import RunFolder

SEGMENTED = "segmented"
EDITED_SIDE = 768  # longest side of a photo in the mask editor
MASK_COLOR = (255, 64, 160)
HALF = 128


@dataclass(frozen=True)
class ReviewedPhoto:
    """A photo of a run, as training will see it.

    Attributes:
        name: its file's name.
        shown: the crop and, beside it, the crop under its mask; or the whole photo if it is not used.
        note: why it is not used, or "".
    """

    name: str
    shown: Image.Image
    note: str = ""


class PhotoReview:
    """Reviews photos with the crop size and the segmenter of a training config.

    Args:
        config: the training config.
        device: where the segmenter runs.
    """

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        self.size = OmegaConf.select(config, "data.params.train.params.size")
        self.segmenter = model_setting(config, "params.segmenter")
        self.device = device

    def review(self, run: RunFolder, super_category: str, crop: str = "subject") -> list[ReviewedPhoto]:
        """Return the photos in use, then those that are left out.

        Args:
            run: the run; it may have no photos yet.
            super_category: what the segmenter looks for; "": photos without painted masks have none.
            crop: "subject" or "center".

        Raises:
            UserError: there is no usable photo, or the segmenter cannot be loaded.
        """
        left_out = [ReviewedPhoto(path.name, _thumbnail(path), "you left it out")
                    for path in sorted(run.left_out.glob("*"))]
        if not any(run.photos.iterdir()):
            return left_out
        dataset = self._dataset(run, super_category, crop)
        reviewed = [ReviewedPhoto(photo.path.name, mask_overlay(image, dataset.mask(index)))
                    for index, (photo, image) in enumerate(zip(dataset.photos, dataset.images, strict=True))]
        for name, reason in dataset.left_out.items():
            reviewed.append(ReviewedPhoto(name, _thumbnail(run.photos / name), reason))
        return reviewed + left_out

    def _dataset(self, run: RunFolder, super_category: str, crop: str) -> ConceptPhotos:
        dataset = ConceptPhotos(run.photos, self.size, crop=crop)
        for photo in dataset.photos:
            painted = run.masks / f"{photo.path.name}.png"
            if painted.is_file():
                photo.mask, photo.mask_source = read_painted_mask(painted, photo.image), "painted"
        if self.segmenter is not None and super_category:
            make_missing_masks([dataset], [super_category], self.segmenter, run.path / SEGMENTED, self.device)
        return dataset

    # Masks

    def mask_to_edit(self, run: RunFolder, name: str, super_category: str) -> dict[str, object]:
        """Return a photo with its mask as a colored layer, as Gradio's image editor takes it.

        Raises:
            UserError: the photo is gone, or is not used.
        """
        photo = self._find(run, name, super_category)
        image = photo.image.copy()
        image.thumbnail((EDITED_SIDE, EDITED_SIDE))
        layer = Image.new("RGBA", image.size, (*MASK_COLOR, 0))
        if photo.mask is not None:
            layer.putalpha(_as_gray(photo.mask).resize(image.size).point(lambda level: 160 if level >= HALF else 0))
        composite = Image.alpha_composite(image.convert("RGBA"), layer)
        return {"background": image, "layers": [layer], "composite": composite}

    def save_mask(self, run: RunFolder, name: str, edited: dict, super_category: str) -> None:
        """Store the painted part of an edited photo as its mask.

        Raises:
            UserError: nothing is painted, or the photo is gone.
        """
        layers = [layer for layer in edited.get("layers") or [] if layer is not None]
        if not layers:
            raise UserError("the mask is empty; paint over the subject")
        opacity = np.max([np.asarray(layer.convert("RGBA").getchannel("A")) for layer in layers], axis=0)
        mask = Image.fromarray(np.where(opacity > 0, 255, 0).astype(np.uint8))
        if not np.asarray(mask).any():
            raise UserError("the mask is empty; paint over the subject")
        self._find(run, name, super_category)
        _write_png(run.masks / f"{name}.png", mask)

    def complete_masks(self, run: RunFolder, super_category: str, crop: str = "subject") -> None:
        """Write the segmenter's masks beside painted ones, so that every photo has a mask. Without these: nothing."""
        if not run.masks.is_dir():
            return
        for photo in self._dataset(run, super_category, crop).photos:
            path = run.masks / f"{photo.path.name}.png"
            if photo.mask is not None and not path.is_file():
                _write_png(path, _as_gray(photo.mask))

    def _find(self, run: RunFolder, name: str, super_category: str) -> TrainingPhoto:
        for photo in self._dataset(run, super_category, "subject").photos:
            if photo.path.name == name:
                return photo
        raise UserError(f"{name}: is not in use; choose another photo")


def _as_gray(mask: Image.Image) -> Image.Image:
    """Return a mask of mode "F" (in [0, 1]) or "L" as mode "L", with a maximum of 255."""
    levels = np.asarray(mask, np.float32)
    return Image.fromarray((255 * levels / max(float(levels.max()), 1e-6)).round().astype(np.uint8))


def _thumbnail(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.thumbnail((256, 256))
            return opened.convert("RGB")
    except Exception:  # decoders raise almost anything, and the file may be of any kind
        return Image.new("RGB", (64, 64), "gray")


def _write_png(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(image.save, format="PNG"))
