"""Training scenes in which the subject stands beside something else, made from the photos and the base model.

In photos the subject is alone, in the middle and large, and all layers but the last ones learn that as a part of the
concept. A prompt with two subjects then shows it badly. So the base model generates images of "a teddy bear next to a
mug", the segmenter finds the teddy bear in them, and the photos' subject takes its place. The captions of these scenes
name what stands beside it, so that the concept does not learn that either.
"""
from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from ldm.common.progress import show_progress
from ldm.common.words import with_article
from ldm.data.concept_photos import ConceptPhotos, ConceptScene
from ldm.data.copy_paste import INSIDE, paste_subject
from ldm.data.images import from_tensor, to_tensor
from ldm.data.kinds import EVERYDAY_KINDS
from ldm.data.templates import SLOT, fill_template
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.modules.subject_masks import find_subject
from ldm.personalization.training_prompts import ModelWithWords

log = logging.getLogger(__name__)

CAPTIONS = ("a photo of a {} next to {}", "a photo of a {} and {}", "a photo of {} next to a {}")
TRIES = 3  # images generated for each scene, at most
BATCH_SIZE = 4
SMALLEST, LARGEST = 0.03, 0.45  # share of an image that the object may fill: not the whole image, not a speck


@dataclass(frozen=True)
class SceneSettings:
    """How scenes are made.

    Attributes:
        count: number of scenes for each concept.
        steps, scale: sampling steps and guidance scale of the generated images.
    """

    count: int
    steps: int
    scale: float


def add_scenes(model: ModelWithWords, photos: ConceptPhotos, super_category: str, segmenter: ZeroShotSegmenter,
               settings: SceneSettings) -> None:
    """Make scenes for a concept, and add them to its photos.

    Images in which the segmenter does not find the super-category are not used. If it is found in too few of them, a
    warning says so.

    Args:
        model: the base model, on its device.
        photos: with masks; without any, nothing is added.
        super_category: what the subject is.
        segmenter: finds it in generated images.
        settings: see there.
    """
    subjects = [(to_tensor(image), photos.mask(index)[0]) for index, image in enumerate(photos.images)]
    subjects = [(image, mask) for image, mask in subjects if mask.min() < INSIDE]
    if not subjects:
        log.warning("no photo has a mask; training goes on without copy-paste scenes")
        return
    tries = TRIES * settings.count
    made = _make_scenes(model, subjects, super_category, segmenter, settings, tries)
    scenes = list(show_progress(islice(made, settings.count), settings.count,
                                f"scenes beside other things for {photos.placeholder_token}", "scenes"))
    if len(scenes) < settings.count:
        log.warning("the segmenter finds a %s in only %d of %d generated images, so there are only so many scenes",
                    super_category, len(scenes), tries)
    if scenes:
        photos.add_scenes(scenes)


def _make_scenes(model: ModelWithWords, subjects: Sequence[tuple[Tensor, Tensor]], super_category: str,
                 segmenter: ZeroShotSegmenter, settings: SceneSettings, tries: int) -> Iterator[ConceptScene]:
    """Yield scenes from up to `tries` generated images, with the subjects of the photos in turn."""
    captions, turns = scene_captions(model, super_category, tries), cycle(subjects)
    for caption, image in zip(captions, _generate(model, captions, super_category, settings), strict=True):
        region = _find(segmenter, image, super_category)
        if region is not None:
            scene, mask = paste_subject(image, region, *next(turns))
            yield ConceptScene(from_tensor(scene), mask[None], caption)


def scene_captions(model: ModelWithWords, super_category: str, count: int) -> list[str]:
    """Return captions with a `{}` for the concept, each with another thing that the text encoder knows."""
    encoder, own = model.cond_stage_model, set(super_category.lower().split())
    others = [kind for kind in EVERYDAY_KINDS if not own & set(kind.split())]
    things = [kind for kind in others if not encoder.unknown_words(kind)] or others
    rng = random.Random(f"{super_category}/{count}")
    rng.shuffle(things)
    captions = []
    for index in range(count):
        named = with_article(things[index % len(things)])
        first = index % len(CAPTIONS) == len(CAPTIONS) - 1  # the caption that names the other thing first
        captions.append(CAPTIONS[index % len(CAPTIONS)].format(*((named, SLOT) if first else (SLOT, named))))
    return captions


@torch.no_grad()
def _generate(model: ModelWithWords, captions: Sequence[str], super_category: str, settings: SceneSettings
              ) -> Iterator[Tensor]:
    """Yield an image (3, H, W) in [-1, 1] for each caption, of a plain super-category. Seeds are the indices."""
    for first in range(0, len(captions), BATCH_SIZE):
        prompts = [fill_template(caption, super_category) for caption in captions[first:first + BATCH_SIZE]]
        latents = model.generate_latents(model.plain_prompts(prompts), range(first, first + len(prompts)),
                                         settings.steps, settings.scale)
        for latent in latents:
            yield model.decode_first_stage(latent[None])[0].float().cpu().clamp(-1, 1)


def _find(segmenter: ZeroShotSegmenter, image: Tensor, super_category: str) -> Tensor | None:
    """Return the region (H, W) of the super-category in an image (3, H, W), or None if it is not found."""
    probabilities = find_subject(segmenter, from_tensor(image), super_category, min(image.shape[-2:]))
    region = probabilities > 0.5 * probabilities.max()
    return region if SMALLEST < float(region.float().mean()) < LARGEST else None
