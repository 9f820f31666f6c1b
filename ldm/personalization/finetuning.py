"""The methods that Perfusion is compared with have this in common: a word, and perhaps weights of the U-Net.

Unlike Perfusion they edit no layer: prompts are encoded with vectors in the place of the word, and that is all.
"""
from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.trainable_word import TrainableWord
from ldm.data.personalized import PersonalizedBase
from ldm.modules.context import PromptContext
from ldm.personalization.base import PersonalizationMethod, check_positive


class FinetuningMethod(PersonalizationMethod):
    """A base model that learns vectors for the concept's word, and in subclasses weights of its own.

    Args (beside those of `PersonalizationMethod`, where the papers use no masks: a null segmenter gives the plain loss):
        embedding_lr: learning rate of the word's vectors.
    """

    method: ClassVar[str]

    def __init__(self, embedding_lr: float = 0.005, **concept_learner: Any) -> None:
        check_positive(embedding_lr=embedding_lr)
        super().__init__(**concept_learner)
        self.embedding_lr = embedding_lr

    def word(self, super_category: str) -> tuple[Tensor, Tensor]:
        """Where the learned vectors (n, width) of the word start, and the vectors (m, width) that follow and stay."""
        raise NotImplementedError

    def make_concept(self, data: PersonalizedBase, super_category: str) -> TrainableWord:
        word = TrainableWord(*self.word(super_category)).to(self.device)
        self._tokens = self.training_tokens(data, len(word()))
        return word

    def parameter_groups(self) -> list[dict[str, Any]]:
        learned = [concept.vectors for concept in self.concepts if len(concept.vectors)]
        return [{"params": learned, "lr": self.embedding_lr}] if learned else []

    def prompt_context(self, prompts: list[str]) -> PromptContext:
        _, encoding, rows = self.encoded(prompts, [concept() for concept in self.concepts])
        return PromptContext.plain(encoding[rows])

    def export_concept(self, place: int = 0) -> FinetunedConcept:
        """What has been learned so far; its weights are the model's own, not copies of them."""
        trained = [*self.concepts[place].parameters(), *self.trained_unet_weights().values()]
        return FinetunedConcept(
            method=self.method, placeholder=self.placeholders[place], super_category=self.super_categories[place],
            vectors=self.concepts[place]().detach(), inputs=self.word_inputs(),
            weights={name: weight.detach() for name, weight in self.trained_unet_weights().items()},
            parameter_count=sum(parameter.numel() for parameter in trained),
            steps=int(self.global_step), base=self.base)

    def word_inputs(self) -> Tensor:
        """What a file keeps of the word's encodings, for merging: (k, d), or (0, 0)."""
        return torch.zeros(0, 0)

