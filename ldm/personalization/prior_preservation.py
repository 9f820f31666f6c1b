"""Fine-tuning the U-Net with prior preservation: it goes on drawing the super-category as it always did.

Ruiz et al. 2023, "DreamBooth" (arXiv 2208.12242), Sec. 3.3, Eq. 2; Custom Diffusion has it, too.
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
from tqdm import trange

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.common.words import replace_word
from ldm.concepts.trainable_word import TrainableWord
from ldm.data.images import from_tensor, save_grid
from ldm.data.personalized import PersonalizedBase
from ldm.data.templates import SLOT
from ldm.modules.context import PromptContext
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.encoders.prompts import word_vector
from ldm.personalization.base import check_positive
from ldm.personalization.finetuning import FinetuningMethod

log = logging.getLogger(__name__)

CACHE_FORMAT = "latents-1"  # part of every key: change it when what is drawn changes
DRAWN_AT_A_TIME = 8
SHOWN = 16


class PriorPreservation(FinetuningMethod):
    """A model of which some weights are trained on the photos and on pictures that it has drawn of the super-category.

    The concept's word is a modifier and the super-category after it, "sks teddy bear", or one new word. The pictures
    are drawn once, before training, and kept as latents in the folder `prior` beside the run's own, where runs of the
    same base model, super-category and sentences find them.

    Args (beside those of `FinetuningMethod`):
        weight_lr: learning rate of the weights.
        rare_word: a word that means little to the text encoder, at whose embedding the modifier starts; None: the
            concept's word is a new one without the super-category after it, starting at that one's embedding.
        prior_weight: lambda, what an error on the drawn pictures counts beside one on the photos; 0: none are drawn.
        prior_count: how many pictures are drawn; each step sees as many of them as of the photos.
        prior_steps, prior_scale: sampling steps and guidance that they are drawn with.
    """

    learns_word = False

    def __init__(self, weight_lr: float = 1e-5, rare_word: str | None = "sks", prior_weight: float = 1.0,
                 prior_count: int = 200, prior_steps: int = 50, prior_scale: float = 6.0, **tuning: Any) -> None:
        check_positive(weight_lr=weight_lr, prior_count=prior_count, prior_steps=prior_steps)
        if prior_weight < 0 or prior_scale < 0:
            raise UserError(f"prior_weight {prior_weight}, prior_scale {prior_scale}: must not be below 0")
        super().__init__(**tuning)
        self.weight_lr, self.rare_word = weight_lr, rare_word
        self.prior_weight, self.prior_count = prior_weight, prior_count
        self.prior_steps, self.prior_scale = prior_steps, prior_scale

    def word(self, super_category: str) -> tuple[Tensor, Tensor]:
        encoder = self.cond_stage_model
        category = encoder.token_table[encoder.word_pieces(super_category)]
        start = word_vector(encoder, super_category if self.rare_word is None else self.rare_word)
        after = category[:0] if self.rare_word is None else category
        return (start, after) if self.learns_word else (start[:0], torch.cat([start, after]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*super().parameter_groups(), {"params": list(self.trained_unet_weights().values()), "lr": self.weight_lr}]

    # The prior

    def make_concept(self, data: PersonalizedBase, super_category: str) -> TrainableWord:
        if self.prior_weight:
            prompts = [replace_word(super_category, SLOT, template) for template in data.templates]
            self._prior_encodings = self.cond_stage_model(prompts)
            self._prior = self._load_or_generate_prior(prompts)
        return super().make_concept(data, super_category)

    def _load_or_generate_prior(self, prompts: list[str]) -> Tensor:
        """Latents (prior_count, C, h, w) of pictures of the prompts, which take turns; from the cache if there."""
        path = Path(self.trainer.default_root_dir).parent / "prior" / f"{self._prior_key(prompts)}.safetensors"
        if path.is_file():
            return load_tensors(path)[0]["latents"]
        log.info("drawing %d pictures of %r for prior preservation", self.prior_count, self.super_categories[0])
        firsts = trange(0, self.prior_count, DRAWN_AT_A_TIME, desc="prior", unit="batch")
        training = self.training
        self.eval()
        latents = torch.cat([self._draw(range(first, min(first + DRAWN_AT_A_TIME, self.prior_count)))
                             for first in firsts])
        self.train(training)
        save_tensors(path, {"latents": latents}, {"prior": {"prompts": prompts}})
        pictures = [from_tensor(self.decode_first_stage(z[None].to(self.device))[0]) for z in latents[:SHOWN]]
        save_grid(pictures, path.with_suffix(".png"), 8, [prompts[n % len(prompts)] for n in range(len(pictures))])
        return latents

    def _prior_key(self, prompts: list[str]) -> str:
        """Names everything that the pictures depend on; W_K and W_V stand for the U-Net."""
        network = [self.base, encoder_fingerprint(self.cond_stage_model), self.parameterization]
        schedule = hashlib.sha256(self.alphas_cumprod.cpu().numpy().tobytes()).hexdigest()
        drawing = [prompts, self.prior_count, self.prior_steps, self.prior_scale, self.latent_shape]
        key = json.dumps([CACHE_FORMAT, network, schedule, drawing])
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def _draw(self, numbers: range) -> Tensor:
        """Latents of the pictures with these numbers, each from a seed of its own."""
        context = self._prior_context(torch.tensor(numbers))
        empty = PromptContext.plain(self.cond_stage_model([""]).expand(len(numbers), -1, -1))
        generators = [Generator().manual_seed(number) for number in numbers]
        latents = self.sample_latents(context, len(numbers), self.prior_steps, self.prior_scale, empty,
                                      generators=generators)
        return latents.float().cpu()

    def _prior_context(self, numbers: Tensor) -> PromptContext:
        """The encoded prompts of the pictures with these numbers."""
        return PromptContext.plain(self._prior_encodings[(numbers % len(self._prior_encodings)).to(self.device)])

    def step_losses(self, batches: Mapping[int, Mapping[str, Any]], generators: Sequence[Generator]
                    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L(photos) + lambda L(prior), each the base model's own objective, of the only concept: (1,)."""
        losses, numbers = super().step_losses(batches, generators)
        if not self.prior_weight:
            return losses, numbers
        (batch,), (generator,) = batches.values(), generators
        chosen = torch.randint(self.prior_count, (len(batch["caption"]),), generator=generator)
        z = self._prior[chosen].to(self.device)
        noise, t = self.noise_and_times(z, generator)
        prior, _ = self.p_losses(z, self._prior_context(chosen), t, noise)
        total = losses + self.prior_weight * prior
        return total, {**numbers, "loss_prior": prior.detach()[None], "loss": total.detach()}
