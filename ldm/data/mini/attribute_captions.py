"""Captions that bind attributes to a noun: in "a photo of a (red striped|cat)", "red striped" belongs to "cat" alone.

`ldm.modules.encoders.attribute_binding` encodes them.
"""
from __future__ import annotations

import re

from ldm.common.words import replace_word

ATTRIBUTED_NOUN = re.compile(r"\(([^(|)]+)\|([^(|)]+)\)")


def bind_attributes(attributes: str, noun: str) -> str:
    """Return the noun with its attributes as captions have it, "(red|cat)"; without attributes, the noun alone."""
    return f"({attributes}|{noun})" if attributes else noun


def plain_caption(caption: str) -> str:
    """Return the caption without the attributes that are bound to nouns: "a (red|owl)" becomes "an owl"."""
    return _expand_nouns(caption, r"\2")


def full_caption(caption: str) -> str:
    """Return the caption with the attributes in front of their nouns: "an (orange|cat)" becomes "an orange cat"."""
    return _expand_nouns(caption, r"\1 \2")


def _expand_nouns(caption: str, template: str) -> str:
    """Replace each noun with attributes by a template, in which group 1 is the attributes and group 2 the noun."""
    for match in list(ATTRIBUTED_NOUN.finditer(caption)):
        caption = replace_word(match.expand(template), match[0], caption)
    return caption
