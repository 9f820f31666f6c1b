"""Encode the prompts of a batch, each distinct one once, and keep encodings that never change."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.modules.encoders.prompts import PromptEncoder
from ldm.util import to_device


@dataclass(frozen=True)
class DistinctPrompts:
    """The P distinct prompts of a batch of B, encoded.

    Attributes:
        tokens: (P, N), on the CPU.
        encoding: (P, N, d).
        pooled: (P, m), the pooled encodings; None if the text encoder has none.
        rows: (B,), for each of the B prompts its row among the P, on the CPU.
    """

    tokens: Tensor
    encoding: Tensor
    pooled: Tensor | None
    rows: Tensor


class WordEncoder:
    """Encodes prompts with the words of concepts in them.

    Args:
        encoder: the text encoder.
        placeholders: the words.
    """

    def __init__(self, encoder: PromptEncoder, placeholders: Sequence[str]) -> None:
        self.encoder, self.placeholders = encoder, list(placeholders)

    def distinct(self, prompts: Sequence[str], counts: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Return the P distinct prompts, their tokens (P, N), and for each of the B prompts its row among them.

        Args:
            prompts: B prompts.
            counts: number of vectors of each placeholder.
        """
        rows = {prompt: row for row, prompt in enumerate(sorted(set(prompts)))}
        tokens = self.encoder.tokenize(list(rows), self.placeholders, counts)
        return list(rows), tokens, torch.tensor([rows[prompt] for prompt in prompts])

    def encode(self, prompts: Sequence[str], vectors: Sequence[Tensor], with_pooled: bool = True) -> DistinctPrompts:
        """Encode a batch; gradients reach the vectors.

        Args:
            prompts: B prompts.
            vectors: the word vectors (n, width) of each placeholder.
            with_pooled: whether to compute the pooled encodings, if the text encoder has any.
        """
        _, tokens, rows = self.distinct(prompts, [len(own) for own in vectors])
        encoding, pooled = encode_exactly(self.encoder, tokens, torch.cat(list(vectors)), with_pooled)
        return DistinctPrompts(tokens, encoding, pooled, rows)


class FixedPrompts:
    """Encodings of prompts whose words do not change: each prompt is encoded once and kept.

    Args:
        words: encodes them.
        vectors: the vector (1, width) of each placeholder.
    """

    def __init__(self, words: WordEncoder, vectors: Sequence[Tensor]) -> None:
        self.words, self.vectors = words, torch.cat(list(vectors))
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], device: torch.device) -> DistinctPrompts:
        """Return the encodings of B prompts on a device, without gradient."""
        distinct, tokens, rows = self.words.distinct(prompts, [1] * len(self.vectors))
        missing = [row for row, prompt in enumerate(distinct) if prompt not in self._kept]
        if missing:
            encoding, pooled = encode_exactly(self.words.encoder, tokens[missing], self.vectors)
            for index, row in enumerate(missing):
                own = None if pooled is None else pooled[index]
                self._kept[distinct[row]] = encoding[index], own
        encodings, vectors = zip(*(self._kept[prompt] for prompt in distinct), strict=True)
        pooled = None if vectors[0] is None else to_device(torch.stack(vectors), device)
        return DistinctPrompts(tokens, to_device(torch.stack(encodings), device), pooled, rows)


def encode_exactly(encoder: PromptEncoder, tokens: Tensor, vectors: Tensor | None = None, with_pooled: bool = True
                   ) -> tuple[Tensor, Tensor | None]:
    """Return what `encode_with_pooled` does, in 32 bits: C^-1 would magnify what half precision rounds off."""
    with torch.autocast(encoder.device.type, enabled=False):
        if with_pooled:
            return encoder.encode_with_pooled(tokens, vectors)
        return encoder.encode_tokens(tokens, vectors), None
