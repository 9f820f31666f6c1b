"""Textual Inversion: Gal et al., "An Image is Worth One Word" (ICLR 2023, arXiv 2208.01618).

A placeholder in a prompt stands for vectors that are learned while everything else is frozen (there Sec. 3, Eq. 2).
Its files are those of `ldm.concepts.finetuned_concept`, as the scripts that draw read them.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept, load_concepts, save_concepts
from ldm.modules.encoders.prompts import PromptEncoder, word_vector

METHOD = "textual-inversion"


class EmbeddingManager(nn.Module):
    """Learned vectors for placeholders, and the encoding of prompts that have such placeholders.

    Args:
        embedder: the model's text encoder; only its table is read here.
        placeholder_strings: the words that stand for the vectors, such as "*"; a vector each, or several.
        initializer_words: a plain word for each placeholder, at whose embedding its vectors start; where there are
            fewer, the vectors of the others start like any word's.
        num_vectors_per_token: how many vectors one placeholder stands for.

    Raises:
        UserError: equal placeholders, or a word that the vocabulary cannot express.
    """

    def __init__(self, embedder: PromptEncoder, placeholder_strings: Sequence[str] = ("*",),
                 initializer_words: Sequence[str] = (), num_vectors_per_token: int = 1) -> None:
        super().__init__()
        self.placeholders = _distinct(placeholder_strings)
        self.words = [*initializer_words, *[None] * len(self.placeholders)][:len(self.placeholders)]
        starts = [_start(embedder, word, num_vectors_per_token) for word in self.words]
        self.vectors = nn.ParameterList(starts)
        for place, start in enumerate(starts):
            self.register_buffer(f"start_{place}", start.clone(), persistent=False)

    def forward(self, embedder: PromptEncoder, prompts: Sequence[str]) -> Tensor:
        """The prompts encoded by `embedder`, (B, N, d), with the vectors where placeholders stand."""
        tokens = embedder.tokenize(prompts, self.placeholders, [len(vectors) for vectors in self.vectors])
        return embedder.encode_tokens(tokens, torch.cat(list(self.vectors)))

    def distance(self) -> Tensor:
        """The mean squared distance of a placeholder's vectors from where they started."""
        squares = [(vectors - getattr(self, f"start_{place}")).square().sum()
                   for place, vectors in enumerate(self.vectors)]
        return torch.stack(squares).mean()

    def save(self, path: str | Path, base: str = "", steps: int = 0) -> Path:
        """Writes a concept for each placeholder, whole or not at all.

        Args:
            base: fingerprint of the U-Net that they were learned on, as `ldm.concepts.concept` makes it.
            steps: how many steps they were learned in.
        """
        concepts = [FinetunedConcept(METHOD, placeholder, word or "thing", vectors.detach(), steps=steps, base=base,
                                 parameter_count=vectors.numel())
                    for placeholder, word, vectors in zip(self.placeholders, self.words, self.vectors, strict=True)]
        return save_concepts(path, concepts, precision=None)

    def load(self, path: str | Path) -> None:
        """Takes placeholders and vectors from a file that `save` wrote, in place of those that are here.

        Raises:
            UserError: there is no such file, it is of another kind, or of a text encoder of another width.
        """
        concepts = load_concepts(path)
        if any(not isinstance(concept, FinetunedConcept) or concept.method != METHOD for concept in concepts):
            raise UserError(f"{path}: not learned by Textual Inversion; choose another file")
        width = self.vectors[0].shape[1]
        if any(concept.vectors.shape[1] != width for concept in concepts):
            raise UserError(f"{path}: its vectors are not of width {width}, as this model's words; "
                            "choose the model that it was trained on")
        device = self.vectors[0].device
        self.placeholders = _distinct([concept.placeholder for concept in concepts])
        self.words = [concept.super_category for concept in concepts]
        self.vectors = nn.ParameterList(concept.vectors.to(device) for concept in concepts)
        for place, vectors in enumerate(self.vectors):
            self.register_buffer(f"start_{place}", vectors.detach().clone(), persistent=False)


def _distinct(placeholders: Sequence[str]) -> list[str]:
    words = list(placeholders)
    if not words or len({word.lower() for word in words}) < len(words):
        raise UserError(f"placeholder_strings {words}: give one or more words that differ, where case does not count")
    return words


def _start(embedder: PromptEncoder, word: str | None, count: int) -> Tensor:
    """(count, width) float32: the word's embedding again and again, or numbers spread like those of the table."""
    table = embedder.token_table.detach().float()
    if word is None:
        return table.mean() + table.std() * torch.randn(count, table.shape[1], device=table.device)
    return word_vector(embedder, word).detach().float().repeat(count, 1)
