"""Turn the photos of a run into what the loss reads: latents, loss weights and captions.

The first stage encodes every photo once, before training, as it is and mirrored. A training step then samples latents
from the cached posterior. Masks become weights on the latent grid in the same way.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ldm.common.errors import UserError
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.images import to_tensor
from ldm.data.masks import feather_mask
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.objectives import resize_mask_to_latents
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import user_error_for


@dataclass(frozen=True)
class LatentBatch:
    """What the loss reads of B photos of one concept.

    Attributes:
        latents: (B, C, h, w), scaled by the model's `scale_factor`.
        weights: (B, 1, h, w) in [0, 1], by which the squared error of each position is multiplied.
        sizes: (B, 6), sizes and crops of the photos in pixels, see `ConceptPhotos.sizes`; models such as SDXL read
            them.
        captions: B prompts with the concept's placeholder.
    """

    latents: Tensor
    weights: Tensor
    sizes: Tensor
    captions: list[str]


class CachedLatents:
    """The encoded photos and masks of all concepts of a run.

    Args:
        model: encodes the photos with its first stage.
        photos: the training set of each concept, all of the same image size.
        mask_border: see `PersonalizationMethod`.

    Attributes:
        moments: (M, 2, 2C, h, w), mean and log-variance of the posterior of each of M photos, plain and mirrored.
        weights: (M, 2, 1, h, w), the masks on the latent grid, plain and mirrored.
        sizes: (M, 2, 6), sizes and crops of the photos, plain and mirrored.
        first_photos: for each concept, the index of its first photo among the M.

    Raises:
        UserError: the photos' size does not fit the first stage or the U-Net.
    """

    def __init__(self, model: LatentDiffusion, photos: Sequence[ConceptPhotos], mask_border: float = 0.0) -> None:
        self.scale_factor = model.scale_factor
        counts = [len(dataset.images) for dataset in photos]
        self.first_photos = [sum(counts[:index]) for index in range(len(counts))]
        self.moments = torch.cat([_encode_photos(model, dataset) for dataset in photos])
        _check_latent_shape(model, self.moments.shape[2] // 2, *self.moments.shape[3:])
        masks = torch.stack([dataset.mask(photo) for dataset in photos for photo in range(len(dataset.images))])
        self.weights = self._masks_to_weights(masks, mask_border)
        self.sizes = torch.stack([dataset.sizes(photo) for dataset in photos for photo in range(len(dataset.images))])

    def _masks_to_weights(self, masks: Tensor, mask_border: float) -> Tensor:
        """Bring masks (M, 1, H, W) to the latent grid, plain and mirrored: (M, 2, 1, h, w)."""
        masks = feather_mask(masks, round(mask_border * min(masks.shape[-2:])))
        both = torch.stack([masks, masks.flip(-1)], 1).to(self.moments)
        return resize_mask_to_latents(both.flatten(0, 1), self.moments.shape[-2:]).unflatten(0, (-1, 2))

    def first_latents(self, count: int) -> Tensor:
        """Return the scaled latents of up to `count` of the first concept's photos, (B, C, h, w), without sampling."""
        last = self.first_photos[1] if len(self.first_photos) > 1 else len(self.moments)
        return self.scale_factor * self.moments[:min(count, last), 0].chunk(2, dim=1)[0]

    def first_sizes(self, count: int) -> Tensor:
        """Return the sizes (count, 6) of as many photos as `first_latents` returns."""
        return self.sizes[:count, 0].to(self.moments.device)

    def batch(self, concept: int, items: Mapping[str, Any], generator: Generator, device: torch.device) -> LatentBatch:
        """Return latents, weights, sizes and captions of a batch of photos of one concept.

        Args:
            concept: index of the concept.
            items: a collated batch of its `ConceptPhotos`.
            generator: samples the latents from the posterior.
            device: where the tensors are needed.
        """
        chosen = items["index"] + self.first_photos[concept], items["flipped"].long()
        posterior = DiagonalGaussianDistribution(self.moments.to(device)[chosen])
        latents = self.scale_factor * posterior.sample(generator)
        return LatentBatch(
            latents=latents,
            weights=self.weights.to(latents)[chosen],
            sizes=self.sizes.to(device)[chosen],
            captions=list(items["caption"]),
        )


@torch.no_grad()
def _encode_photos(model: LatentDiffusion, dataset: ConceptPhotos) -> Tensor:
    """Return the posterior's moments of every photo, plain and mirrored: (M, 2, 2C, h, w)."""
    moments = []
    device = next(model.first_stage_model.parameters(), model.betas).device
    for photo in dataset.images:
        image = to_tensor(photo).to(device)
        with user_error_for(f"photos of {dataset.size} pixels (data.params.train.params.size) do not fit the first "
                            "stage"):
            posterior = model.first_stage_model.encode(torch.stack([image, image.flip(-1)]))
        if isinstance(posterior, DiagonalGaussianDistribution):
            moments.append(posterior.parameters)
        else:  # a first stage without a posterior: its latents are a mean without variance
            moments.append(torch.cat([posterior, posterior - torch.inf], 1))
    return torch.stack(moments)


def _check_latent_shape(model: LatentDiffusion, channels: int, height: int, width: int) -> None:
    """Raise UserError if the U-Net cannot take the first stage's latents, or latents of `image_size`."""
    if channels != model.channels:
        raise UserError(f"channels {model.channels} (model.params), but the first stage's latents have {channels}; "
                        f"set channels to {channels}")
    step = 2 ** (len(getattr(model.model.diffusion_model, "channel_mult", (1,))) - 1)
    misfits = [side for side in (height, width, *model.latent_shape[1:]) if side % step]
    if misfits:
        raise UserError(f"latents with a side of {misfits[0]}, from size (data.params.train.params) or image_size "
                        f"(model.params), but the U-Net takes multiples of {step}; change it")
