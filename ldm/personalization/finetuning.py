"""Base class of the methods that Perfusion is compared with: they train word vectors, and perhaps weights of the U-Net.

Unlike Perfusion they edit no layer: prompts are encoded with the vectors at the placeholder's position.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.finetuned_prompt_encoder import FinetunedPromptEncoder
from ldm.concepts.trainable_word import TrainableWord
from ldm.data.concept_photos import ConceptPhotos
from ldm.modules.context import PromptContext
from ldm.modules.covariance_files import cached_covariance
from ldm.modules.rank_one import invert_covariance
from ldm.personalization.base import PersonalizationMethod
from ldm.personalization.checks import check_positive


class FinetuningMethod(PersonalizationMethod):
    """A base model that learns vectors for the concept's word and, in subclasses, weights of its own.

    Args (beside those of `PersonalizationMethod`; without a segmenter there are no masks, as in the papers):
        embedding_lr: learning rate of the word's vectors.

    Raises:
        UserError: a learning rate is not above 0.
    """

    def __init__(self, embedding_lr: float = 0.005, **personalization: Any) -> None:
        check_positive(embedding_lr=embedding_lr)
        super().__init__(**personalization)
        self.embedding_lr = embedding_lr

    def initial_vectors(self, super_category: str) -> tuple[Tensor, Tensor]:
        """Return the start of the trained vectors (n, width), and the vectors (m, width) that follow and stay fixed."""
        raise NotImplementedError

    def make_concept(self, dataset: ConceptPhotos, super_category: str) -> TrainableWord:
        learned, fixed = self.initial_vectors(super_category)
        given = self.initial_words[len(self.concepts)]
        if given is not None and not len(learned):
            raise UserError(f"init_embedding: {self.method_name} trains no word vectors; leave it out")
        word = TrainableWord(learned if given is None else given.to(learned), fixed).to(self.device)
        self._training_tokens = self.training_tokens(dataset, len(word()))
        return word

    def parameter_groups(self) -> list[dict[str, Any]]:
        vectors = [concept.vectors for concept in self.concepts if len(concept.vectors)]
        return [{"params": vectors, "lr": self.embedding_lr}] if vectors else []

    def prompt_context(self, prompts: list[str]) -> PromptContext:
        distinct = self.word_encoder.encode(prompts, [concept() for concept in self.concepts])
        return PromptContext.plain(distinct.encoding, pooled=distinct.pooled).select(distinct.rows)

    def export_concept(self, index: int = 0) -> FinetunedConcept:
        """Return what has been learned so far. Its weights are the model's own, not copies of them."""
        weights = self.trained_unet_weights()
        trained = [*self.concepts[index].parameters(), *weights.values()]
        return FinetunedConcept(
            method=self.method, method_name=self.method_name, placeholder=self.placeholders[index],
            super_category=self.super_categories[index], vectors=self.concepts[index]().detach(),
            inputs=self.average_word_encodings(),
            weights={name: weight.detach() for name, weight in weights.items()},
            parameter_count=sum(parameter.numel() for parameter in trained),
            steps=int(self.global_step), **self.base_model.stored)

    def average_word_encodings(self) -> Tensor:
        """Return the encodings of the word's tokens that a file keeps for merging, (k, d); (0, 0) if it needs none."""
        return torch.zeros(0, 0)

    def sampling_encoder(self, concepts: Sequence[FinetunedConcept]) -> FinetunedPromptEncoder:
        encoder = self.cond_stage_model
        return FinetunedPromptEncoder(encoder, self.model.diffusion_model, concepts, self.base_model,
                                      lambda: invert_covariance(cached_covariance(encoder)))
