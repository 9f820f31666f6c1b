"""Textual Inversion as the original LDM configs run it (`personalization_config`).

Source: Gal et al., "An Image is Worth One Word" (ICLR 2023, arXiv 2208.01618), Sec. 3, Eq. 2. A placeholder in a prompt
stands for vectors that are trained while everything else is frozen. Files have the format of
`ldm.concepts.finetuned_concept_file`, so the generation scripts read them.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.placeholders import find_duplicate
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.modules.encoders.prompts import PromptEncoder, word_vector

METHOD = "textual-inversion"
UNKNOWN_SUPER_CATEGORY = "thing"  # in files, for a placeholder without an initializer word


class EmbeddingManager(nn.Module):
    """Trainable vectors for placeholders, and the encoding of prompts that contain such placeholders.

    Args:
        embedder: the text encoder of the model; the constructor only reads its embedding table.
        placeholder_strings: the words that stand for the vectors, such as "*".
        initializer_words: a plain word for each placeholder; its embedding is the start of the vectors. Placeholders
            without a word start at random numbers that are distributed like the embedding table.
        num_vectors_per_token: number of vectors that one placeholder stands for.

    Raises:
        UserError: two placeholders are equal, or the vocabulary cannot express a word.
    """

    def __init__(self, embedder: PromptEncoder, placeholder_strings: Sequence[str] = ("*",),
                 initializer_words: Sequence[str] = (), num_vectors_per_token: int = 1) -> None:
        super().__init__()
        self.placeholders = _check_distinct(placeholder_strings)
        count = len(self.placeholders)
        self.words: list[str | None] = [*initializer_words, *[None] * count][:count]
        starts = [_start(embedder, word, num_vectors_per_token) for word in self.words]
        self._set_vectors(starts)

    def _set_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Start training at these vectors, one tensor (k, width) per placeholder."""
        self.vectors = nn.ParameterList(vectors)
        for index, start in enumerate(self.vectors):
            self.register_buffer(f"start_{index}", start.detach().clone(), persistent=False)

    def forward(self, embedder: PromptEncoder, prompts: Sequence[str]) -> Tensor:
        """Encode prompts with the vectors in place of the placeholders; return (B, N, d)."""
        tokens = embedder.tokenize(prompts, self.placeholders, [len(vectors) for vectors in self.vectors])
        return embedder.encode_tokens(tokens, torch.cat(list(self.vectors)))

    def distance(self) -> Tensor:
        """Return the squared distance of a placeholder's vectors from their start, averaged over placeholders."""
        squares = []
        for index, vectors in enumerate(self.vectors):
            squares.append((vectors - getattr(self, f"start_{index}")).square().sum())
        return torch.stack(squares).mean()

    def save(self, path: str | Path, base: str = "", steps: int = 0) -> Path:
        """Write one concept per placeholder to a file. The file is complete or not written at all.

        Args:
            path: the file; an existing one is replaced.
            base: `base_fingerprint` of the U-Net that the vectors were trained with.
            steps: number of training steps.
        """
        concepts = []
        for placeholder, word, vectors in zip(self.placeholders, self.words, self.vectors, strict=True):
            concepts.append(FinetunedConcept(
                method=METHOD,
                placeholder=placeholder,
                super_category=word or UNKNOWN_SUPER_CATEGORY,
                vectors=vectors.detach(),
                parameter_count=vectors.numel(),
                steps=steps,
                base=base,
            ))
        return save_concepts(path, concepts, precision=None)

    def load(self, path: str | Path) -> None:
        """Replace placeholders and vectors by those of a file that `save` wrote.

        Raises:
            UserError: the file is missing, of another kind, or for a text encoder of another width.
        """
        concepts = load_concepts(path)
        if any(not isinstance(concept, FinetunedConcept) or concept.method != METHOD for concept in concepts):
            raise UserError(f"{path}: not learned by Textual Inversion; choose another file")
        width = self.vectors[0].shape[1]
        if any(concept.vectors.shape[1] != width for concept in concepts):
            raise UserError(f"{path}: its vectors are not of width {width}, unlike the words of this model; "
                            "choose the model that it was trained on")
        device = self.vectors[0].device
        self.placeholders = _check_distinct([concept.placeholder for concept in concepts])
        self.words = [concept.super_category for concept in concepts]
        self._set_vectors([concept.vectors.to(device) for concept in concepts])


def _check_distinct(placeholders: Sequence[str]) -> list[str]:
    """Return the placeholders as a list; raise UserError if there are none or two are equal."""
    words = list(placeholders)
    if not words or find_duplicate(words) is not None:
        raise UserError(f"placeholder_strings {words}: give one or more different words (case is ignored)")
    return words


def _start(embedder: PromptEncoder, word: str | None, count: int) -> Tensor:
    """Return `count` start vectors (count, width) in float32: the word's embedding repeated, or random numbers."""
    table = embedder.token_table.detach().float()
    if word is None:
        return table.mean() + table.std() * torch.randn(count, table.shape[1], device=table.device)
    return word_vector(embedder, word).detach().float().repeat(count, 1)
