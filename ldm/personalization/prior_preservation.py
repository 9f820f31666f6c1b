"""Fine-tuning the U-Net with prior preservation: the super-category keeps its appearance.

Ruiz et al. 2023, "DreamBooth" (arXiv 2208.12242), Sec. 3.3, Eq. 2. Custom Diffusion uses it, too.
"""
from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.common.progress import show_progress
from ldm.common.words import replace_word
from ldm.concepts.trainable_word import TrainableWord
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.contact_sheet import save_grid
from ldm.data.images import from_tensor
from ldm.data.templates import SLOT
from ldm.modules.context import PromptContext
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.encoders.prompts import word_vector
from ldm.personalization.base import Batch
from ldm.personalization.checks import check_positive
from ldm.personalization.finetuning import FinetuningMethod

log = logging.getLogger(__name__)

CACHE_FORMAT = "latents-1"  # part of every cache key: change it if prior images come out differently
SAMPLING_BATCH_SIZE = 8
PREVIEW_COUNT = 16  # prior images shown in a grid beside the cache


class PriorPreservation(FinetuningMethod):
    """A model that trains some of its weights on the photos and on images that it has generated of the super-category.

    The concept's word is a modifier followed by the super-category, "sks teddy bear", or one new word. The prior images
    are generated once, before training. They are kept as latents in the folder `prior` beside the run's own, where runs
    with the same base model, super-category and prompts find them.

    Args (beside those of `FinetuningMethod`):
        weight_lr: learning rate of the weights.
        rare_word: a word that means little to the text encoder, at whose embedding the modifier starts. None: the
            placeholder is a single new word, which starts at the super-category's embedding.
        prior_weight: lambda, the weight of the loss on the prior images; 0: none are generated.
        prior_count: number of prior images. Each step sees as many of them as photos.
        prior_steps, prior_scale: sampling steps and guidance scale of the prior images.

    Raises:
        UserError: a param is out of range.
    """

    trains_word = False

    def __init__(self, weight_lr: float = 1e-5, rare_word: str | None = "sks", prior_weight: float = 1.0,
                 prior_count: int = 200, prior_steps: int = 50, prior_scale: float = 6.0, **finetuning: Any) -> None:
        check_positive(weight_lr=weight_lr, prior_count=prior_count, prior_steps=prior_steps)
        if prior_weight < 0 or prior_scale < 0:
            raise UserError(f"prior_weight {prior_weight}, prior_scale {prior_scale}: must not be below 0")
        super().__init__(**finetuning)
        self.weight_lr, self.rare_word = weight_lr, rare_word
        self.prior_weight, self.prior_count = prior_weight, prior_count
        self.prior_steps, self.prior_scale = prior_steps, prior_scale

    def initial_vectors(self, super_category: str) -> tuple[Tensor, Tensor]:
        encoder = self.cond_stage_model
        category = encoder.embed_pieces(encoder.word_pieces(super_category))
        if self.rare_word is None:
            start, following = word_vector(encoder, super_category), category[:0]
        else:
            start, following = word_vector(encoder, self.rare_word), category
        if self.trains_word:
            return start, following
        return start[:0], torch.cat([start, following])

    def parameter_groups(self) -> list[dict[str, Any]]:
        weights = {"params": list(self.trained_unet_weights().values()), "lr": self.weight_lr}
        return [*super().parameter_groups(), weights]

    # The prior images

    def make_concept(self, dataset: ConceptPhotos, super_category: str) -> TrainableWord:
        if self.prior_weight:
            prompts = [replace_word(super_category, SLOT, template) for template in dataset.prompts]
            self._prior_prompts = self.plain_prompts(prompts)
            self._prior_latents = self._load_or_generate_prior(prompts)
        return super().make_concept(dataset, super_category)

    def _load_or_generate_prior(self, prompts: list[str]) -> Tensor:
        """Return latents (prior_count, C, h, w) of images that cycle through the prompts, from the cache if any."""
        path = Path(self.trainer.default_root_dir).parent / "prior" / f"{self._prior_key(prompts)}.safetensors"
        if path.is_file():
            return load_tensors(path)[0]["latents"]
        log.info("generating %d images of %r for prior preservation", self.prior_count, self.super_categories[0])
        was_training = self.training
        self.eval()
        batches = []
        for first in show_progress(range(0, self.prior_count, SAMPLING_BATCH_SIZE), description="prior", unit="batches",
                                   leave=True):
            batches.append(self._generate_prior(range(first, min(first + SAMPLING_BATCH_SIZE, self.prior_count))))
        latents = torch.cat(batches)
        self.train(was_training)
        save_tensors(path, {"latents": latents}, {"prior": {"prompts": prompts}})
        images = [from_tensor(self.decode_first_stage(z[None].to(self.device))[0]) for z in latents[:PREVIEW_COUNT]]
        titles = [prompts[index % len(prompts)] for index in range(len(images))]
        save_grid(images, path.with_suffix(".png"), 8, titles)
        return latents

    def _prior_key(self, prompts: list[str]) -> str:
        """Return a hash of everything that the prior images depend on; W_K and W_V stand for the U-Net."""
        network = [self.base_model.fingerprint, encoder_fingerprint(self.cond_stage_model), self.parameterization]
        schedule = hashlib.sha256(self.alphas_cumprod.cpu().numpy().tobytes()).hexdigest()
        sampling = [prompts, self.prior_count, self.prior_steps, self.prior_scale, self.latent_shape]
        key = json.dumps([CACHE_FORMAT, network, schedule, sampling])
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def _generate_prior(self, indices: range) -> Tensor:
        """Return latents of the prior images with these indices. Each image has its own seed, its index."""
        latents = self.generate_latents(self._prior_prompts_at(torch.tensor(indices)), indices, self.prior_steps,
                                        self.prior_scale)
        return latents.float().cpu()

    def _prior_prompts_at(self, indices: Tensor) -> PromptContext:
        """Return the encoded prompts of the prior images with these indices."""
        return self._prior_prompts.select((indices % self._prior_prompts.batch_size).to(self.device))

    # The loss

    def concept_losses(self, batches: Mapping[int, Batch], generators: Sequence[Generator]
                       ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L(photos) + lambda L(prior), each the base model's own objective, of the only concept: (1,)."""
        losses, numbers = super().concept_losses(batches, generators)
        if not self.prior_weight:
            return losses, numbers
        # A step sees as many prior images as photos.
        (batch,), (generator,) = batches.values(), generators
        chosen = torch.randint(self.prior_count, (len(batch["caption"]),), generator=generator)
        z = self._prior_latents[chosen].to(self.device)
        noise, timesteps = self.sample_noise_and_timesteps(z, generator)
        context = self.with_sizes(self._prior_prompts_at(chosen), self.sampling_sizes(len(chosen)))
        prior_loss = self.per_sample_losses(z, context, timesteps, noise)[0].mean()
        total = losses + self.prior_weight * prior_loss
        return total, {**numbers, "loss_prior": prior_loss.detach()[None], "loss": total.detach()}
