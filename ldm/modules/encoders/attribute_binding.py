"""A CLIP text tower that binds attributes to nouns: it encodes the captions of `ldm.data.mini.attribute_captions`.

A caption such as "a (red striped|cat) on the beach" is encoded twice: as the plain caption ("a cat on the beach") and
as the full caption ("a red striped cat on the beach"). The result is the encoding of the plain caption, in which the
tokens of "cat" are replaced by those of the full caption. So only the noun carries the attributes, and a U-Net trained
on these encodings learns what "striped" looks like from the noun's tokens alone.

A base model trained in this way keeps the appearance of a subject where a concept has to put it: in the keys and values
of one token. Large text encoders blend a noun with its adjectives by themselves (Rassin et al., "DALLE-2 is Seeing
Double", 2022). A small encoder trained together with its U-Net does not: it leaves colors to the color words.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.data.mini.attribute_captions import ATTRIBUTED_NOUN, full_caption, plain_caption
from ldm.modules.context import PromptContext
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import PromptEncoder


@dataclass(frozen=True)
class NounTokens:
    """The tokens of one noun that has attributes.

    Attributes:
        caption: index of its caption.
        plain_start: index of its first token in the plain caption.
        full_start: index of its first token in the full caption.
        count: number of its tokens.
    """

    caption: int
    plain_start: int
    full_start: int
    count: int


def locate_nouns(encoder: PromptEncoder, captions: Sequence[str]) -> list[NounTokens]:
    """Locate the nouns that have attributes, in the order of the captions."""
    caption_indices: list[int] = []
    texts: list[str] = []
    for index, caption in enumerate(captions):
        for match in ATTRIBUTED_NOUN.finditer(caption):
            beginning = caption[:match.end()]  # up to the noun's last token
            caption_indices.append(index)
            texts += [match[2], plain_caption(beginning), full_caption(beginning)]

    # Tokenize all texts in one call. The start token takes index 0.
    lengths = iter(map(len, encoder.word_pieces_of(texts)))
    nouns = []
    for index in caption_indices:
        count, plain_end, full_end = next(lengths), next(lengths), next(lengths)
        nouns.append(NounTokens(index, 1 + plain_end - count, 1 + full_end - count, count))
    return nouns


class AttributeBindingCLIPEmbedder(FrozenCLIPEmbedder):
    """The text tower of a CLIP that binds attributes to nouns. It has the weights of a `FrozenCLIPEmbedder`.

    Args (in addition to those of `FrozenCLIPEmbedder`):
        plain_keys: fraction of the captions whose keys come from the plain caption, 0 to 1. As with Perfusion's
            key-locking, the attributes of these nouns are in their values only.

    Raises:
        UserError: if `plain_keys` is not between 0 and 1, or an argument of `FrozenCLIPEmbedder` does not fit.
    """

    renamed_params: ClassVar[dict[str, str]] = {"told_keys": "plain_keys"}

    def __init__(self, *args: Any, plain_keys: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= plain_keys <= 1:
            raise UserError(f"plain_keys {plain_keys} is a fraction of the captions; give a number from 0 to 1")
        self.plain_keys = plain_keys

    def forward(self, text: Sequence[str] | str) -> Tensor | PromptContext:
        """Encode captions in which only nouns carry their attributes.

        Args:
            text: B captions, or one.

        Returns:
            Encodings (B, max_length, d). If `plain_keys` is above 0, a context whose keys may have encodings of their
            own.

        Raises:
            UserError: if a full caption has too many tokens.
        """
        captions = [text] if isinstance(text, str) else text
        nouns = locate_nouns(self, captions)

        # Encode every plain caption, and the full captions that differ from them.
        with_attributes = list(dict.fromkeys(noun.caption for noun in nouns))
        full_captions = [full_caption(captions[index]) for index in with_attributes]
        encoding = self.encode_tokens(self.tokenize([*map(plain_caption, captions), *full_captions]))
        plain, full = encoding[:len(captions)], encoding[len(captions):]

        bound = _bind_nouns(plain, full, nouns, with_attributes) if nouns else plain
        if not self.plain_keys:
            return bound

        # Choose the captions whose keys do not see the attributes.
        locked = (torch.rand(len(captions)) < self.plain_keys).to(plain.device)
        context = PromptContext.plain(bound)
        return replace(context, key_projected=torch.where(locked[:, None, None], plain, bound))


def _bind_nouns(plain: Tensor, full: Tensor, nouns: Sequence[NounTokens], with_attributes: Sequence[int]) -> Tensor:
    """Replace the nouns' tokens in the plain encodings by those of the full encodings.

    Args:
        plain: (B, N, d), the encodings of the plain captions.
        full: (F, N, d), the encodings of the full captions.
        nouns: the nouns to replace.
        with_attributes: caption index of each of the F full captions.

    Returns:
        (B, N, d)
    """
    moves = [(noun.caption, noun.plain_start + offset, with_attributes.index(noun.caption), noun.full_start + offset)
             for noun in nouns for offset in range(noun.count)]
    row, position, full_row, full_position = torch.tensor(moves, device=plain.device).T
    return plain.index_put((row, position), full[full_row, full_position])
