"""Score images by all metrics of the registry."""
from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Iterable, Sequence

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from evaluation.metrics.registry import METRICS, Scores
from evaluation.metrics.settings import NO_SEGMENTER, ReferenceSettings
from evaluation.metrics.similarity import ImageBatch, References
from evaluation.stats.intervals import Estimate, cluster_bootstrap_mean
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT, resolve_path
from ldm.common.progress import show_progress
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.images import describe_files, to_tensor
from ldm.inference.model_config import inference_defaults, segmenter_of
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import ZeroShotSegmenter

log = logging.getLogger(__name__)

EVALUATION_CLIP = PROJECT_ROOT / "models" / "mini" / "evaluation_clip"
BATCH_SIZE = 64  # images in memory


class ConceptScorer:
    """Scores images by their texts and one concept's photos.

    Args:
        clip, photos, super_category, segmenter, masks: see `References`.
    """

    def __init__(self, clip: ClipEncoder, photos: Tensor, super_category: str,
                 segmenter: ZeroShotSegmenter | None = None, masks: Tensor | None = None) -> None:
        self.references = References(clip, photos, super_category, segmenter, masks)

    def __call__(self, images: Tensor, texts: Sequence[str]) -> list[Scores]:
        """Return the scores of each image, by the metrics' names.

        Args:
            images: (M, 3, H, W) in [-1, 1].
            texts: M prompts in plain words, with the super-category in place of the concept's word.

        Raises:
            ValueError: there is not one text for each image.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} texts for {len(images)} images")
        if not texts:
            return []
        batch = ImageBatch(images, texts, self.references)
        columns = {metric.name: metric.score(batch) for metric in METRICS}
        return [{name: values[index] for name, values in columns.items()} for index in range(len(texts))]

    def score_all(self, images: Iterable[Image.Image], texts: Sequence[str]) -> list[Scores]:
        """Return the scores of any number of images of one size, which are read a few at a time."""
        scores: list[Scores] = []
        remaining = iter(show_progress(images, len(texts), "scoring", "images"))
        while batch := list(itertools.islice(remaining, BATCH_SIZE)):
            start = len(scores)
            scores += self(stack_images(batch), texts[start:start + len(batch)])
        return scores

    def score_photos(self) -> Scores:
        """Return what the photos reach among each other; None if a metric does not apply to them."""
        return {metric.name: metric.score_photos(self.references) for metric in METRICS}


def stack_images(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as (M, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])


def estimate_means(scores: Sequence[Scores], prompts: Sequence[Hashable]) -> dict[str, Estimate]:
    """Return the mean of each metric that has values, with an interval from resampling prompts.

    Args:
        scores: scores of each image.
        prompts: a key for each image; images of one prompt belong together.
    """
    estimates = {}
    for metric in METRICS:
        pairs = [(score[metric.name], prompt) for score, prompt in zip(scores, prompts, strict=True)
                 if score[metric.name] is not None]
        if pairs:
            values, clusters = zip(*pairs, strict=True)
            estimates[metric.name] = cluster_bootstrap_mean(list(values), list(clusters))
    return estimates


def load_scorer(settings: ReferenceSettings, config: DictConfig, checkpoint: str | None, device: torch.device,
                side: int, super_category: str | None) -> ConceptScorer:
    """Load the photos that images are compared with, and the models that compare them.

    Args:
        settings: which photos and models.
        config, checkpoint: config and weights of the base model, whose default CLIP and segmenter are used.
        side: side of the square images, in pixels.
        super_category: what the segmenter looks for; None is allowed only without a segmenter.

    Raises:
        UserError: a file or model cannot be used, or the segmenter has nothing to look for.
    """
    photos = ConceptPhotos(settings.photos, side, mask_root=settings.masks, crop="center")
    if photos.left_out:
        log.warning("%s: left out %s", settings.photos, describe_files(photos.left_out))
    segmenter, masks = None, None
    if settings.segmenter != NO_SEGMENTER:
        if super_category is None:
            raise UserError('--super_category: nothing says what the photos show; give words such as "teddy bear", or '
                            "--segmenter none to leave objects out")
        segmenter = ZeroShotSegmenter.from_path(settings.segmenter or segmenter_of(config), device)
    if photos.has_masks:
        masks = torch.stack([photos.mask(index) for index in range(len(photos.paths))])
    clip = ClipEncoder.from_path(_clip_name(settings, config, checkpoint), device)
    return ConceptScorer(clip, stack_images(photos.images), super_category or "", segmenter, masks)


def _clip_name(settings: ReferenceSettings, config: DictConfig, checkpoint: str | None) -> str:
    """Return the folder or name of the CLIP: the given one, the one in the model's config, or the bundled one."""
    if settings.clip is not None:
        return settings.clip
    name = resolve_path(inference_defaults(config, checkpoint).evaluation_clip or EVALUATION_CLIP)
    if not name.is_dir():
        raise UserError(f"--clip {name}: there are no weights; name another CLIP, such as ViT-B-32/openai")
    return str(name)
