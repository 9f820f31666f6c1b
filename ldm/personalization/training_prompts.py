"""The prompts of a model that learns concepts, and the sizes of images that some models read beside them."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ldm.common.errors import UserError
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.templates import fill_template
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.modules.context import PromptContext
from ldm.personalization.distinct_prompts import WordEncoder, encode_exactly


class ModelWithWords(LatentDiffusion):
    """A latent diffusion model whose prompts may hold the words of concepts.

    Attributes:
        placeholders: the words; subclasses set them.
    """

    placeholders: list[str]

    @property
    def word_encoder(self) -> WordEncoder:
        """The text encoder, with the placeholders of the concepts."""
        return WordEncoder(self.cond_stage_model, self.placeholders)

    @property
    def word_widths(self) -> list[int]:
        """The width of each text encoder's part of a word vector."""
        return list(self.cond_stage_model.word_parts.values())

    def training_tokens(self, dataset: ConceptPhotos, vector_count: int = 1) -> Tensor:
        """Return the tokens (T, N) of a concept's training prompts, its placeholder as `vector_count` tokens.

        Raises:
            UserError: the placeholder also occurs in a template itself, or a prompt is too long with it.
        """
        word = dataset.placeholder_token
        tokens = self.cond_stage_model.tokenize(
            [fill_template(template, word) for template in dataset.prompts], [word], [vector_count])
        if not bool((self.concept_positions(tokens).sum(1) == vector_count).all()):
            raise UserError(f"placeholder {word!r}: is an ordinary word of the training prompts; "
                            "give a word of its own, such as <my-teddy>")
        return tokens

    def concept_positions(self, tokens: Tensor) -> Tensor:
        """Return (B, N) booleans: the positions of concepts' tokens, which are numbered past the vocabulary."""
        return tokens >= self.cond_stage_model.vocabulary_size

    @torch.no_grad()
    def plain_prompts(self, prompts: Sequence[str]) -> PromptContext:
        """Encode B prompts without the words of concepts."""
        encoder = self.cond_stage_model
        encoding, pooled = encode_exactly(encoder, encoder.tokenize(prompts))
        return PromptContext.plain(encoding, pooled=pooled).to(self.device)

    def with_sizes(self, context: PromptContext, sizes: Tensor) -> PromptContext:
        """Return B prompts with the sizes and crops (B, 6) of their images, if the model reads them."""
        encoder = self.cond_stage_model
        return encoder.add_sizes(context, sizes) if hasattr(encoder, "add_sizes") else context

    def sampling_sizes(self, count: int) -> Tensor:
        """Return the sizes of generated images, which are not cropped, (count, 6)."""
        size = self.pixel_size
        return torch.tensor([[*size, 0, 0, *size]] * count, dtype=torch.float32, device=self.device)

    def generate_latents(self, prompts: PromptContext, seeds: Sequence[int], steps: int, scale: float) -> Tensor:
        """Sample scaled latents (B, C, h, w) of B encoded prompts without concepts, each from a seed of its own."""
        encoding, pooled = self.cond_stage_model.encode_unconditional()
        empty = PromptContext.plain(encoding, pooled=pooled).select([0] * len(seeds))
        sizes = self.sampling_sizes(len(seeds))
        return self.sample_latents(self.with_sizes(prompts, sizes), len(seeds), steps, scale,
                                   self.with_sizes(empty, sizes),
                                   generators=[Generator().manual_seed(seed) for seed in seeds])
