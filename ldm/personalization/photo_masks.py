"""Masks of a run's photos: made where they are missing, and summed up in one line."""
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.data.concept_photos import ConceptPhotos
from ldm.data.images import describe_files
from ldm.data.training_photos import same_shots
from ldm.modules.mask_cache import cached_subjects
from ldm.modules.segmentation import ZeroShotSegmenter

log = logging.getLogger(__name__)

SMALL_CROP = 0.5  # share of a photo's area
SOURCES = {"painted": "painted", "transparency": "from the photos' transparency", "segmenter": "by the segmenter"}


def make_missing_masks(photos: Sequence[ConceptPhotos], super_categories: Sequence[str], segmenter: str,
                       folder: Path, device: torch.device) -> None:
    """Segment the subject in the photos that have no mask yet, and crop them around it.

    Photos in which the subject is not found are left out, unless it is found in none.

    Args:
        photos: the training set of each concept.
        super_categories: what the segmenter looks for in each.
        segmenter: folder or hub name of a CLIPSeg.
        folder: where masks are kept as image files.
        device: where the segmenter runs.

    Raises:
        UserError: the segmenter cannot be loaded.
    """
    lacking = [index for index, dataset in enumerate(photos) if any(photo.mask is None for photo in dataset.photos)]
    if not lacking:
        return
    model = ZeroShotSegmenter.from_path(segmenter, device,
                                        "train with --masks none, or with --masks FOLDER of your own masks")
    for index in lacking:
        log.info("segmenting the photos for %r with %s", super_categories[index], segmenter)
        _segment(photos[index], super_categories[index], model, folder)


def _segment(dataset: ConceptPhotos, super_category: str, segmenter: ZeroShotSegmenter, folder: Path) -> None:
    missing = [index for index, photo in enumerate(dataset.photos) if photo.mask is None]
    found = cached_subjects([dataset.photos[index].path for index in missing],
                            [dataset.photos[index].image for index in missing],
                            segmenter, super_category, folder, dataset.size)
    masks: list[torch.Tensor | None] = [None] * len(dataset.photos)
    for index, probabilities in zip(missing, found, strict=True):
        if probabilities.any():
            masks[index] = probabilities
    dataset.set_subject_masks(masks)
    if not dataset.has_masks:
        log.warning("the segmenter finds no %s in any photo; they are used without masks. Is --init_word right?",
                    super_category)


def log_summary(dataset: ConceptPhotos) -> None:
    """Log in one line which photos are used, how they are cropped, where masks are from, and how much counts.

    Files that are left out make the line a warning. So do copies of the same shot, which have a line of their own.
    """
    used, found = len(dataset.photos), len(dataset.photos) + len(dataset.left_out)
    parts = [f"{used} photos used" if used == found else f"{used} photos used of {found} files; left out "
             + describe_files(dataset.left_out), _describe_crops(dataset), _describe_masks(dataset)]
    if dataset.scene_count:
        parts.append(f"{dataset.scene_count} scenes beside other things")
    log.log(logging.WARNING if dataset.left_out else logging.INFO, "%s: %s", dataset.placeholder_token,
            "; ".join(parts))
    for first, second in same_shots(dataset.photos):
        log.warning("%s and %s show the same shot, which counts twice", first.name, second.name)


def _describe_crops(dataset: ConceptPhotos) -> str:
    """Say where crops are, and name the photos of which less than half is in the crop."""
    masked = sum(photo.mask is not None for photo in dataset.photos)
    around = masked if dataset.crop == "subject" else 0
    centered = len(dataset.photos) - around
    crops = " and ".join(text for text in (f"{around} cropped around the subject" if around else "",
                                           f"{centered} cropped to the square in the center" if centered else "")
                         if text)
    small = {photo.path.name: f"{100 * share:.0f} % of it" for photo, share in
             zip(dataset.photos, dataset.cropped_shares(), strict=True) if share < SMALL_CROP}
    return f"{crops}, {describe_files(small)}" if small else crops


def _describe_masks(dataset: ConceptPhotos) -> str:
    if not dataset.has_masks:
        return "no masks, so backgrounds count as well"
    sources = Counter(photo.mask_source for photo in dataset.photos)
    masks = ", ".join(f"{count} {SOURCES.get(source, 'missing')}" for source, count in sources.items())
    shares = [100 * float(dataset.mask(index).mean()) for index in range(len(dataset.photos))]
    return f"masks: {masks}; {min(shares):.0f} to {max(shares):.0f} % of each crop count"
