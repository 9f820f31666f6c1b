"""Encodings of nouns: that of a super-category on average, and what words about a look change in it.

Symbols as in `ldm.modules.rank_one`: d is the width of the text encodings.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.common.prompt_file import SLOT
from ldm.common.words import replace_word
from ldm.data.templates import fill_template
from ldm.modules.encoders.prompts import PromptEncoder, word_vector

TOLD = f"a photo of a {SLOT}"  # the noun must be its end
PROMPTS_AT_A_TIME = 64
STAND_IN = "<noun>"


@torch.no_grad()
def mean_encoding(encoder: PromptEncoder, noun: str, templates: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the word vector (1, width) of a noun, and its encoding (d,), averaged over templates: i_super.

    Args:
        encoder: the text encoder.
        noun: the super-category, such as "teddy bear".
        templates: sentences with one `{}` each.

    Raises:
        UserError: the vocabulary has no piece for the noun, or a template is too long.
    """
    vector = word_vector(encoder, noun)
    tokens = encoder.tokenize([fill_template(template, STAND_IN) for template in templates], [STAND_IN])
    return vector, encoder.encode_tokens(tokens, vector)[tokens >= encoder.vocabulary_size].mean(0)


@torch.no_grad()
def told_moves(encoder: PromptEncoder, nouns: Sequence[str], looks: Sequence[str]) -> Tensor:
    """Return the moves (M, d) in the encoding of nouns that words about their looks make.

    It is the encoding of "teddy bear" in "a photo of a purple striped teddy bear" minus that in "a photo of a teddy
    bear", averaged over the noun's tokens. A model that was trained on such sentences draws the look from this alone.

    Args:
        encoder: the text encoder.
        nouns: M nouns.
        looks: their looks, such as "purple and yellow striped"; "" moves nothing.

    Raises:
        UserError: a sentence is too long.
    """
    phrases = [(noun, "") for noun in nouns] + list(zip(nouns, looks, strict=True))
    distinct = {phrase: row for row, phrase in enumerate(dict.fromkeys(phrases))}
    encodings = []
    for first in range(0, len(distinct), PROMPTS_AT_A_TIME):
        encodings.append(_noun_encodings(encoder, list(distinct)[first:first + PROMPTS_AT_A_TIME]))
    rows = torch.cat(encodings)[[distinct[phrase] for phrase in phrases]]
    plain, described = rows.chunk(2)
    return described - plain


def _noun_encodings(encoder: PromptEncoder, phrases: Sequence[tuple[str, str]]) -> Tensor:
    """Return the encodings (B, d) of nouns behind the words about their looks."""
    prompts = [replace_word(f"{look} {noun}".strip(), SLOT, TOLD) for noun, look in phrases]
    encodings = encoder.encode_tokens(encoder.tokenize(prompts))
    lengths = [len(pieces) for pieces in encoder.word_pieces_of(prompts)]
    counts = [len(pieces) for pieces in encoder.word_pieces_of([noun for noun, _ in phrases])]
    # The start token comes first, so the last piece of a prompt is at its length.
    spans = zip(encodings, lengths, counts, strict=True)
    return torch.stack([row[length + 1 - count:length + 1].mean(0) for row, length, count in spans])
