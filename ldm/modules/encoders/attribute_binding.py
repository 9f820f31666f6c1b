"""A text tower that reads captions with asides (see `ldm.data.mini.attribute_captions`): words that only the noun behind them hears.

A caption is read twice, with its asides ("heard") and without them ("told"). The encoding is that of the caption as
told, but for the tokens of nouns, which have heard their asides. So whatever attends to it learns of stripes from the
noun alone.

A base model that is trained on such captions keeps a thing's looks where a concept has to put them: in what its layers
make of one token. Large text encoders blend a noun with its adjectives by themselves (Rassin et al., "DALLE-2 is Seeing
Double", 2022, show how far that goes); a small one, trained along with its U-Net, leaves colours to colour words.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.data.mini.attribute_captions import ASIDE, as_heard, as_told
from ldm.modules.context import PromptContext
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import PromptEncoder


@dataclass(frozen=True)
class Noun:
    """Where the tokens of a noun with an aside stand: the first one as told and as heard, and how many there are."""

    told: int
    heard: int
    count: int


def nouns(encoder: PromptEncoder, captions: Sequence[str]) -> list[tuple[int, Noun]]:
    """The nouns that have asides, each with the number of its caption."""
    found = [(row, match, caption[:match.end()]) for row, caption in enumerate(captions)
             for match in ASIDE.finditer(caption)]
    texts = [text for _, match, until in found for text in (match[2], as_told(until), as_heard(until))]
    counts = map(len, encoder.word_pieces_of(texts))
    return [(row, Noun(1 + told - count, 1 + heard - count, count))
            for (row, _, _), count, told, heard in zip(found, counts, counts, counts, strict=True)]


class AttributeBindingCLIPEmbedder(FrozenCLIPEmbedder):
    """The text tower of a CLIP that understands asides; it has the same weights.

    Args (beside those of `FrozenCLIPEmbedder`):
        told_keys: share of the captions with asides whose nouns have heard them in their values only. Keys are then
            those of the plain noun, as Perfusion locks them, and what a noun looks like is all in what it says.
    """

    def __init__(self, *args: Any, told_keys: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= told_keys <= 1:
            raise UserError(f"told_keys {told_keys} is a share of captions; give a number from 0 to 1")
        self.told_keys = told_keys

    def forward(self, text: Sequence[str] | str) -> Tensor | PromptContext:
        """Encodings (B, max_length, d): captions as told, with nouns as they are heard where these have asides.

        With `told_keys` they come as a context in which keys may have encodings of their own.

        Raises:
            UserError: a caption is too long, asides included.
        """
        captions = [text] if isinstance(text, str) else text
        found = nouns(self, captions)
        rows = list(dict.fromkeys(row for row, _ in found))
        encoding = super().forward([*map(as_told, captions), *(as_heard(captions[row]) for row in rows)])
        told, heard = encoding[:len(captions)], encoding[len(captions):]
        if found:
            places = [(row, noun.told + piece, rows.index(row), noun.heard + piece)
                      for row, noun in found for piece in range(noun.count)]
            row, to, heard_row, heard_at = torch.tensor(places, device=encoding.device).T
            heard = told.index_put((row, to), heard[heard_row, heard_at])
        else:
            heard = told
        if not self.told_keys:
            return heard
        locked = (torch.rand(len(captions)) < self.told_keys).to(told.device)
        context = PromptContext.plain(heard)
        return replace(context, key_projected=torch.where(locked[:, None, None], told, heard))
