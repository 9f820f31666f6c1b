"""Captions with asides: "a photo of a (red striped|cat) on the beach" says "red striped" to the cat alone.

`ldm.modules.encoders.attribute_binding` encodes them, and says what for.
"""
from __future__ import annotations

import re

from ldm.common.words import replace_word

ATTRIBUTED_NOUN = re.compile(r"\(([^(|)]+)\|([^(|)]+)\)")


def aside(words: str, noun: str) -> str:
    """A noun with words that only it hears, as captions have it; without words the noun alone."""
    return f"({words}|{noun})" if words else noun


def plain_caption(caption: str) -> str:
    """The caption without its asides."""
    return _read(caption, r"\2")


def full_caption(caption: str) -> str:
    """The caption with its asides in their places."""
    return _read(caption, r"\1 \2")


def _read(caption: str, shown: str) -> str:
    for found in list(ATTRIBUTED_NOUN.finditer(caption)):
        caption = replace_word(found.expand(shown), found[0], caption)
    return caption
