"""Caption templates for training: short and neutral, so that only the placeholder can describe the concept.

Each has one `{}` for the placeholder. All fit into the 32 tokens of the bundled model's text encoder.
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
"""For small base models, which know few words that are not in their own captions."""

TEMPLATES = {"photo": PHOTO, "photo_small": PHOTO_SMALL}


def get_templates(choice: str | Sequence[str]) -> tuple[str, ...]:
    """Return the templates of the set named `choice`, or `choice` itself if it is a list of sentences.

    Raises:
        UserError: there is no such set, the list is empty, or a sentence does not have exactly one `{}`.
    """
    if isinstance(choice, str):
        if choice not in TEMPLATES:
            raise UserError(f"templates: no set {choice!r}; give {' or '.join(TEMPLATES)}, or a list of sentences")
        return TEMPLATES[choice]
    if not choice:
        raise UserError(f"templates: the list is empty; give at least one sentence such as {PHOTO[0]!r}")
    for sentence in choice:
        if not isinstance(sentence, str) or sentence.count(SLOT) != 1:
            raise UserError(f"templates: {sentence!r} needs exactly one {{}}, in place of the concept's word")
    return tuple(choice)


def fill_template(template: str, word: str) -> str:
    """Replace the `{}` of a template by `word`. Other braces in either stay as they are."""
    return template.replace(SLOT, word)
