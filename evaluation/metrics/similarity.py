"""Measure the similarity of an image to its prompt and to the photos of a concept, with a CLIP.

Text similarity is the cosine of an image and its prompt, with the super-category in place of the concept's word. Image
similarity is the mean cosine of an image and the concept's photos. Both are defined as in Gal et al., "An Image is
Worth One Word" (2022), arXiv 2208.01618, and in Perfusion. An image that copies the background of the photos also
gains image similarity. Object similarity therefore compares the objects alone: a segmenter cuts them out of photos
and images, and everything else becomes gray.

All cosines are multiplied by 100.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ldm.data.images import from_tensor
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import MIN_CONFIDENCE, ZeroShotSegmenter

SEGMENTER_BATCH_SIZE = 32


class References:
    """The photos that images of one concept are compared with.

    Args:
        clip: embeds images and texts.
        photos: (N, 3, H, W) in [-1, 1]. They should have the images' size, because a CLIP sees how sharp an image is.
        super_category: what the segmenter looks for.
        segmenter: cuts out objects; None: objects are not compared.
        masks: (N, 1, H, W) in [0, 1], where the concept is in its photos; None: the segmenter finds it.

    Attributes:
        photo_embeddings: (N, d), unit vectors.
        object_embeddings: (M, d), of the objects found in the photos; None if there are none or no segmenter.
    """

    def __init__(self, clip: ClipEncoder, photos: Tensor, super_category: str,
                 segmenter: ZeroShotSegmenter | None = None, masks: Tensor | None = None) -> None:
        self.clip, self.super_category, self.segmenter = clip, super_category, segmenter
        self.photo_embeddings = clip.embed_images(photos)
        self.object_embeddings: Tensor | None = None
        if segmenter is not None:
            objects, found = cut_out_objects(photos, self.segment(photos) if masks is None else masks)
            if found.any():
                self.object_embeddings = clip.embed_images(objects[found])

    def segment(self, images: Tensor) -> Tensor:
        """Return (M, 1, H, W) in [0, 1]: how likely each pixel of the images shows the super-category."""
        size = tuple(images.shape[-2:])
        batches = images.split(SEGMENTER_BATCH_SIZE)
        probabilities = [self.segmenter.segment([from_tensor(image) for image in batch], self.super_category, size)
                         for batch in batches]
        return torch.cat(probabilities)[:, None]


class ImageBatch:
    """Images with their texts, and what several metrics need of them, computed once.

    Args:
        images: (M, 3, H, W) in [-1, 1].
        texts: M prompts in plain words, with the super-category in place of the concept's word.
        references: what the images are compared with.
    """

    def __init__(self, images: Tensor, texts: Sequence[str], references: References) -> None:
        self.images, self.texts, self.references = images, texts, references

    @cached_property
    def embeddings(self) -> Tensor:
        """(M, d), of unit length."""
        return self.references.clip.embed_images(self.images)


def text_similarity(batch: ImageBatch) -> list[float]:
    """Return 100 times the cosine of each image and its text."""
    return (100 * (batch.embeddings * batch.references.clip.embed_texts(batch.texts)).sum(1)).tolist()


def image_similarity(batch: ImageBatch) -> list[float]:
    """Return 100 times the mean cosine of each image and the concept's photos."""
    return (100 * (batch.embeddings @ batch.references.photo_embeddings.T).mean(1)).tolist()


def object_similarity(batch: ImageBatch) -> list[float | None]:
    """Return 100 times the mean cosine of the object in each image and the photos' objects; None if none is found."""
    references = batch.references
    if references.object_embeddings is None:
        return [None] * len(batch.images)
    objects, found = cut_out_objects(batch.images, references.segment(batch.images))
    cosines = 100 * (references.clip.embed_images(objects) @ references.object_embeddings.T).mean(1)
    return [cosine if is_found else None
            for cosine, is_found in zip(cosines.tolist(), found.tolist(), strict=True)]


def photo_similarity(references: References) -> float | None:
    """Return the image similarity that the photos have to each other."""
    return _mean_similarity(references.photo_embeddings)


def photo_object_similarity(references: References) -> float | None:
    """Return the object similarity that the photos have to each other."""
    embeddings = references.object_embeddings
    return None if embeddings is None else _mean_similarity(embeddings)


def cut_out_objects(images: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Make everything but the object gray.

    The object is where the segmenter's probability is at least half of its maximum in that image, because segmenters
    differ in how confident they are. There is no object if the maximum is mere noise. A faint object counts: images in
    which the concept is hard to recognize would otherwise be left out, and the mean would be too good.

    Args:
        images: (M, 3, H, W) in [-1, 1].
        probabilities: (M, 1, H, W) in [0, 1].

    Returns:
        The objects, (M, 3, H, W) on gray, and whether there is one in each image, (M,) of bool.
    """
    maximum = probabilities.amax((1, 2, 3), keepdim=True)
    objects = images.cpu() * (probabilities >= maximum / 2)
    return objects, maximum.flatten() > MIN_CONFIDENCE


def _mean_similarity(embeddings: Tensor) -> float | None:
    """Return 100 times the mean cosine of all pairs of different rows; None for fewer than two rows."""
    count = len(embeddings)
    if count < 2:
        return None
    sum_of_pairs = (embeddings @ embeddings.T).sum() - embeddings.square().sum()  # without each row with itself
    return 100 * float(sum_of_pairs) / (count * (count - 1))
