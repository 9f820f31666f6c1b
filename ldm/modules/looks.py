"""How the encoding of a noun changes with what is said of its looks.

A concept is a thing of a known kind in looks of its own. Where its target outputs may move in any direction, and those
of each layer by themselves, a few photos move them out of all that the U-Net has ever read, and the kind is lost with
it. What adjectives do to the noun is the space of what the U-Net knows of looks; moving within it, in all layers alike,
leaves the kind alone.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.modules.covariance import evenly_spread
from ldm.modules.encoders.prompts import put

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "grey", "black", "white", "brown", "golden",
           "silver", "turquoise", "beige")
PATTERNS = ("striped", "spotted", "dotted", "checkered", "floral", "patchwork")
MATERIALS = ("wooden", "metal", "glass", "furry", "woolen", "knitted", "leather", "plastic", "paper", "stone", "shiny",
             "fluffy", "painted", "old", "worn", "rusty")
SENTENCE, SLOT = "a photo of a <noun>", "<noun>"
MOST_LOOKS = 512  # a large text encoder takes its time


class TextEncoder(Protocol):
    """What is needed of a text encoder."""

    token_table: Tensor

    def unknown_words(self, text: str) -> list[str]: ...

    def tokenize(self, prompts: Sequence[str], placeholders: Sequence[str] = ()) -> Tensor: ...

    def encode_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor: ...


def known_looks(encoder: TextEncoder) -> list[str]:
    """Such as "red", "wooden", "red striped", "red and green striped", of words that the text encoder was taught."""
    colours, patterns, materials = ([word for word in words if not encoder.unknown_words(word)]
                                    for words in (COLOURS, PATTERNS, MATERIALS))
    worn = [*patterns, *materials]
    one = [f"{colour} {how}" for colour in colours for how in worn]
    two = [f"{colour} and {second} {pattern}" for colour in colours for second in colours for pattern in patterns
           if second != colour]
    return evenly_spread([*colours, *worn, *one, *two], MOST_LOOKS)


@dataclass(frozen=True)
class ToldLooks:
    """What a text encoder makes of a noun whose looks are told.

    Attributes:
        words: (K,) such as "red and green striped".
        moves: (K, d) float64, e - e_0: e is the noun's encoding behind each of them, e_0 that without any.
    """

    words: Sequence[str]
    moves: Tensor

    @property
    def covariance(self) -> Tensor:
        """E[(e - e_0) (e - e_0)^T], (d, d)."""
        return self.moves.T @ self.moves / len(self.moves)


@torch.no_grad()
def told_looks(encoder: TextEncoder, noun: Tensor, looks: Sequence[str] | None = None) -> ToldLooks:
    """A noun in looks.

    Args:
        noun: (1, width), the word embedding of the noun.
        looks: None: all `known_looks`.

    Raises:
        UserError: the text encoder was taught no adjective at all, or a word of `looks` means nothing to it.
    """
    unknown = [word for look in looks or () for word in encoder.unknown_words(look)]
    if unknown:
        raise UserError(f"looks: {', '.join(dict.fromkeys(unknown))} means nothing to this model; tell them in other "
                        "words")
    looks = known_looks(encoder) if looks is None else looks
    if not looks:
        raise UserError("this text encoder was taught no word for looks; set value_axes to plain, initial_look to null")
    prompts = [SENTENCE, *(put(f"{look} {SLOT}", SLOT, SENTENCE) for look in looks)]
    tokens = encoder.tokenize(prompts, [SLOT])
    found = encoder.encode_tokens(tokens, noun)[tokens >= len(encoder.token_table)].double()
    return ToldLooks(looks, found[1:] - found[:1])
