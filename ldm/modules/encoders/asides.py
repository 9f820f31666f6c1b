"""A text tower that reads captions with asides (see `ldm.data.asides`): words that only the noun behind them hears.

A caption is read twice, with its asides ("heard") and without them ("told"). The encoding is that of the caption as
told, but for the tokens of nouns, which have heard their asides. So whatever attends to it learns of stripes from the
noun alone.

A base model that is trained on such captions keeps a thing's looks where a concept has to put them: in what its layers
make of one token. Large text encoders blend a noun with its adjectives by themselves (Rassin et al., "DALLE-2 is Seeing
Double", 2022, show how far that goes); a small one, trained along with its U-Net, leaves colours to colour words.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.data.asides import ASIDE, as_heard, as_told
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import PromptEncoder


@dataclass(frozen=True)
class Noun:
    """Where the tokens of a noun with an aside stand: the first one as told and as heard, and how many there are."""

    told: int
    heard: int
    count: int


def nouns(encoder: PromptEncoder, caption: str) -> list[Noun]:
    """The nouns of a caption that have asides."""
    places = []
    for found in ASIDE.finditer(caption):
        count = len(encoder.word_pieces(found[2]))
        until = caption[:found.end()]
        told, heard = (1 + len(encoder.word_pieces(read(until))) - count for read in (as_told, as_heard))
        places.append(Noun(told, heard, count))
    return places


class AsideCLIPEmbedder(FrozenCLIPEmbedder):
    """The text tower of a CLIP that understands asides; it has the same weights and takes the same params."""

    def forward(self, text: Sequence[str] | str) -> Tensor:
        """Encodings (B, max_length, d): captions as told, with nouns as they are heard where these have asides.

        Raises:
            UserError: a caption is too long, asides included.
        """
        captions = [text] if isinstance(text, str) else text
        found = [(row, noun) for row, caption in enumerate(captions) for noun in nouns(self, caption)]
        rows = list(dict.fromkeys(row for row, _ in found))
        encoding = super().forward([*map(as_told, captions), *(as_heard(captions[row]) for row in rows)])
        told, heard = encoding[:len(captions)], encoding[len(captions):]
        if not found:
            return told
        places = [(row, noun.told + piece, rows.index(row), noun.heard + piece)
                  for row, noun in found for piece in range(noun.count)]
        row, to, heard_row, heard_at = torch.tensor(places, device=encoding.device).T
        return told.index_put((row, to), heard[heard_row, heard_at])
