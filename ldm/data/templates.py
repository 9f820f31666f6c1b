"""Sentences in which a concept is trained: short and neutral, so that the word alone has to carry the concept.

Each has one `{}` for the placeholder word, and fits well into the 32 tokens of the bundled model's text encoder.
"""
from __future__ import annotations

from collections.abc import Sequence

from ldm.common.errors import UserError

SLOT = "{}"

PHOTO = (
    "a photo of a {}",
    "a picture of the {}",
    "one {} in a photo",
    "an image that shows a {}",
    "the {}, photographed from nearby",
    "a clear photo of the {}",
    "a plain photograph of a {}",
    "a photo with a {} in the middle",
    "a bright picture of one {}",
    "here is a {}",
    "a sharp image of the {}",
)

PHOTO_SMALL = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {}")
"""For small base models, which know few words beyond those of their own captions."""

TEMPLATES = {"photo": PHOTO, "photo_small": PHOTO_SMALL}


def get_templates(choice: str | Sequence[str]) -> tuple[str, ...]:
    """The set of that name, or the given sentences themselves.

    Raises:
        UserError: there is no such set, the list is empty, or a sentence has not exactly one `{}`.
    """
    if isinstance(choice, str):
        if choice not in TEMPLATES:
            raise UserError(f"templates: no set {choice!r}; give {' or '.join(TEMPLATES)}, or a list of sentences")
        return TEMPLATES[choice]
    if not choice:
        raise UserError(f"templates: the list is empty; give at least one sentence such as {PHOTO[0]!r}")
    for sentence in choice:
        if not isinstance(sentence, str) or sentence.count(SLOT) != 1:
            raise UserError(f"templates: {sentence!r} needs exactly one {{}}, where the concept's word goes")
    return tuple(choice)


def fill(template: str, word: str) -> str:
    """The sentence with `word` in its slot; other braces in either stay as they are."""
    return template.replace(SLOT, word)
