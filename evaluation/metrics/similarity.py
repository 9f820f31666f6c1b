"""How like its prompt and how like the concept a picture is, by the embeddings of a CLIP.

Text similarity is the cosine of a picture and its prompt with the super-category in the concept's stead; image
similarity the mean cosine of a picture and the concept's photos (as Gal et al. 2022, arXiv 2208.01618, and Perfusion
measure). A picture that copies the photos' background gains by the latter, so that it is also measured with nothing but
the object in sight: cut out by a segmenter, on grey, in photos and pictures alike.
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from evaluation.stats.intervals import Estimate, cluster_bootstrap_mean
from ldm.data.images import from_tensor
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import MIN_CONFIDENCE, ZeroShotSegmenter

SEGMENTED_AT_A_TIME = 32


@dataclass(frozen=True)
class Similarity:
    """Cosines x 100, each from -100 to 100; `object` is None where nothing was segmented."""

    text: float
    image: float
    object: float | None = None


KINDS = tuple(one.name for one in fields(Similarity))


def figures_of(found: Sequence[Similarity], prompts: Sequence[Hashable]) -> dict[str, Estimate]:
    """The mean of each kind of similarity that there is, its interval by resampling prompts.

    Args:
        prompts: of each picture, whatever names it: pictures of one prompt belong together.
    """
    values = {kind: [(value, prompt) for one, prompt in zip(found, prompts, strict=True)
                     if (value := getattr(one, kind)) is not None] for kind in KINDS}
    return {kind: cluster_bootstrap_mean(*map(list, zip(*pairs, strict=True))) for kind, pairs in values.items() if pairs}


class SimilarityMeter:
    """Measures pictures against their texts and one concept's photos.

    Args:
        recogniser: the CLIP.
        photos: (N, 3, H, W) in [-1, 1]; best of the pictures' own size, as CLIPs see how sharp a picture is.
        super_category: what the segmenter looks for.
        segmenter: None: objects are not measured.
        masks: (N, 1, H, W) in [0, 1], where the concept is in its photos; None: the segmenter says.
    """

    def __init__(self, recogniser: ClipEncoder, photos: Tensor, super_category: str,
                 segmenter: ZeroShotSegmenter | None = None, masks: Tensor | None = None) -> None:
        self.recogniser, self.super_category, self.segmenter = recogniser, super_category, segmenter
        self.photos = recogniser.embed_images(photos)
        self.objects = None
        if segmenter is not None:
            shown, found = cut_out(photos, self._segmented(photos) if masks is None else masks)
            self.objects = recogniser.embed_images(shown[found]) if found.any() else None

    def __call__(self, pictures: Tensor, texts: Sequence[str]) -> list[Similarity]:
        """Of each picture (M, 3, H, W) in [-1, 1] and its text, a prompt with the super-category for the concept.

        Raises:
            ValueError: there is not one text for each picture.
        """
        if len(pictures) != len(texts):
            raise ValueError(f"{len(texts)} texts for {len(pictures)} pictures")
        if not texts:
            return []
        seen = self.recogniser.embed_images(pictures)
        alike = (seen * self.recogniser.embed_texts(texts)).sum(1), (seen @ self.photos.T).mean(1)
        rows = zip(*(100 * cosines for cosines in alike), self._of_objects(pictures), strict=True)
        return [Similarity(float(text), float(image), of_object) for text, image, of_object in rows]

    def among_photos(self) -> tuple[float | None, float | None]:
        """Image and object similarity of each photo to the others, in the mean; None where there are not two."""
        return _among(self.photos), None if self.objects is None else _among(self.objects)

    def _of_objects(self, pictures: Tensor) -> list[float | None]:
        if self.objects is None:
            return [None] * len(pictures)
        shown, found = cut_out(pictures, self._segmented(pictures))
        cosines = 100 * (self.recogniser.embed_images(shown) @ self.objects.T).mean(1)
        return [float(cosine) if there else None for cosine, there in zip(cosines, found, strict=True)]

    def _segmented(self, pictures: Tensor) -> Tensor:
        """(M, 1, H, W) in [0, 1]: how likely each pixel shows the super-category."""
        size = tuple(pictures.shape[-2:])
        parts = [self.segmenter.segment([from_tensor(picture) for picture in part], self.super_category, size)
                 for part in pictures.split(SEGMENTED_AT_A_TIME)]
        return torch.cat(parts)[:, None]


def cut_out(pictures: Tensor, likely: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (M, 3, H, W) in [-1, 1], grey but for the object, and whether there is one in each, (M,) of bool.

    The object is where `likely` (M, 1, H, W) is at least half of its maximum in that picture: segmenters differ in how
    sure they are. There is none where they find nothing but noise; a faint one counts, as leaving out the pictures in
    which a concept is hard to make out would flatter the others' mean.
    """
    surest = likely.amax((1, 2, 3), keepdim=True)
    shown = pictures.cpu() * (likely >= surest / 2)
    return shown, surest.flatten() > MIN_CONFIDENCE


def _among(embeddings: Tensor) -> float | None:
    count = len(embeddings)
    if count < 2:
        return None
    others = (embeddings @ embeddings.T).sum() - embeddings.square().sum()
    return 100 * float(others) / (count * (count - 1))
