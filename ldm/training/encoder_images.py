"""Make the images that a concept encoder is trained on, with the very model that it is for.

No data set is needed: the model generates subjects whose looks the prompts name, and a segmenter finds them. What the
model cannot generate from words, the encoder does not learn.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.progress import show_progress
from ldm.data.generated_subjects import find_subjects, save_subject
from ldm.data.look_prompts import look_prompt
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.modules.subject_masks import find_subject

log = logging.getLogger(__name__)

RECORD = "images.json"
MIN_FOUND = 0.5  # share of the subjects, below which the segmenter is said to fail


@dataclass(frozen=True)
class ImageSet:
    """How the images of a folder are made. A folder holds those of one set, and more can be added later.

    Attributes:
        base: fingerprint of the base model.
        seed: seed of prompts and images.
        sampler, num_inference_steps, guidance_scale: how to generate; None: the model's default.
    """

    base: str
    seed: int = 23
    sampler: str | None = "dpm"
    num_inference_steps: int | None = 12
    guidance_scale: float | None = None


def check_image_set(folder: Path, images: ImageSet) -> None:
    """Raise UserError if a folder holds images that were made otherwise."""
    path = folder / RECORD
    if not path.is_file():
        if find_subjects(folder):
            raise UserError(f"{folder}: holds images without {RECORD}, so nobody knows which model made them; choose "
                            "another folder")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: is damaged; choose another folder") from None
    for name, value in asdict(images).items():
        before = earlier.get(name) if isinstance(earlier, dict) else None
        if before != value:
            what = "by another base model" if name == "base" else f"with {name} {before}, not {value}"
            raise UserError(f"{folder}: its images were made {what}; choose another folder, or continue as before")


def make_images(pipeline: PerfusionPipeline, segmenter: ZeroShotSegmenter, folder: Path, count: int, images: ImageSet,
                batch_size: int | None = None) -> None:
    """Generate the first `count` images of a set that are not in its folder yet, each with the mask of its subject.

    Args:
        pipeline: the base model.
        segmenter: finds the subjects by their kinds.
        folder: created if it is missing.
        count: number of images in the end.
        images: how to make them.
        batch_size: images generated at a time; None: the pipeline's.

    Raises:
        UserError: the folder holds images that were made otherwise, or cannot be written to.
    """
    check_image_set(folder, images)
    write_atomically(folder / RECORD, lambda path: path.write_text(json.dumps(asdict(images), indent=1) + "\n"))
    existing = find_subjects(folder)
    missing = [index for index in range(count) if index not in existing]
    if len(missing) < count:
        log.info("%s: %d of %d images are there already", folder, count - len(missing), count)
    if not missing:
        return
    found = _generate(pipeline, segmenter, folder, missing, images, batch_size)
    if found < MIN_FOUND * len(missing):
        log.warning("warning: the segmenter found the subject in %d of %d images only; the others are left out of the "
                    "training", found, len(missing))


def _generate(pipeline: PerfusionPipeline, segmenter: ZeroShotSegmenter, folder: Path, indices: Sequence[int],
              images: ImageSet, batch_size: int | None) -> int:
    """Generate the images of these indices; return in how many the subject was found."""
    subjects = [look_prompt(images.seed, index) for index in indices]
    requests = [GenerationRequest(subject.text, images.seed + index)
                for subject, index in zip(subjects, indices, strict=True)]
    settings = GenerationSettings(num_inference_steps=images.num_inference_steps, sampler=images.sampler,
                                  guidance_scale=images.guidance_scale)
    generated = pipeline.generate(requests, settings, concepts=[], batch_size=batch_size)
    found = 0
    with show_progress(total=len(indices), description="images of subjects", unit="images", leave=True) as progress:
        for index, subject, image in zip(indices, subjects, generated, strict=True):
            mask = find_subject(segmenter, image, subject.kind, min(image.size))
            found += bool(mask.any())
            save_subject(folder, index, subject, image, mask / mask.max().clamp(min=1e-6))
            progress.update()
    return found
