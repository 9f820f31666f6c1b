"""Find the tokens of a word in a prompt."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.prompt_weights import Prompt
from ldm.modules.encoders.prompts import PromptEncoder


class PromptTokenizer(Protocol):
    """Turns prompts with placeholders into tokens, as `ConceptPromptEncoder` and `FinetunedPromptEncoder` do."""

    encoder: PromptEncoder

    def tokens(self, prompts: Sequence[Prompt]) -> Tensor: ...


def word_positions(tokenizer: PromptTokenizer, prompt: Prompt, word: str) -> Tensor:
    """Return a mask that is true at all tokens of `word`, at each of its occurrences in the prompt.

    Args:
        tokenizer: a prompt encoder that knows the placeholders.
        prompt: any prompt.
        word: a placeholder, or one or several plain words.

    Returns:
        (N,) booleans.

    Raises:
        UserError: the word does not occur in the prompt.
    """
    prompt_tokens, word_tokens = tokenizer.tokens([prompt, word])

    # A placeholder has token ids past the vocabulary; a plain word has those of its word pieces.
    placeholder_ids = word_tokens[word_tokens >= tokenizer.encoder.vocabulary_size]
    if len(placeholder_ids):
        pieces = placeholder_ids
    else:
        pieces = torch.tensor(tokenizer.encoder.word_pieces(word), dtype=prompt_tokens.dtype)

    # Mark every window of the prompt that equals the pieces.
    positions = torch.zeros(len(prompt_tokens), dtype=torch.bool)
    if len(pieces):
        windows = prompt_tokens.unfold(0, len(pieces), 1)
        starts = (windows == pieces).all(1).nonzero()  # (occurrences, 1)
        positions[starts + torch.arange(len(pieces))] = True
    if not positions.any():
        text = prompt if isinstance(prompt, str) else "".join(part.text for part in prompt)
        raise UserError(f"the word {word!r} does not occur in the prompt {text!r}; name one that does")
    return positions
