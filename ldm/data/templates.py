"""Caption templates for training: short and neutral, so that only the placeholder can describe the concept.

Each has one `{}` for the placeholder. All fit into the 32 tokens of the bundled model's text encoder.
"""
from __future__ import annotations

from collections.abc import Sequence

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.common.prompt_file import SLOT, read_prompt_file

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
    """Return the templates of the set named `choice`, those of a file of that name, or `choice` itself if it is a list.

    Raises:
        UserError: there is no such set or file, the list is empty, or a sentence does not have exactly one `{}`.
    """
    if isinstance(choice, str):
        if choice in TEMPLATES:
            return TEMPLATES[choice]
        if not resolve_path(choice).is_file():
            raise UserError(f"templates: no set {choice!r}; give {' or '.join(TEMPLATES)}, or a list of sentences")
        choice = [prompt.text for prompt in read_prompt_file(resolve_path(choice), f"templates {choice}")]
    if not choice:
        raise UserError(f"templates: the list is empty; give at least one sentence such as {PHOTO[0]!r}")
    for sentence in choice:
        if not isinstance(sentence, str) or sentence.count(SLOT) != 1:
            raise UserError(f"templates: {sentence!r} needs exactly one {{}}, in place of the concept's word")
    return tuple(choice)


def fill_template(template: str, word: str) -> str:
    """Replace the `{}` of a template by `word`. Other braces in either stay as they are."""
    return template.replace(SLOT, word)


def add_note(template: str, note: str, placeholder: str) -> str:
    """Return the template of a photo's captions, given what a note beside the photo says.

    A note that names the concept, by `{}` or by its placeholder, is the whole caption. Any other note follows the
    template, after a comma.
    """
    own = note.replace(placeholder, SLOT)
    if own.count(SLOT) == 1:
        return own
    return f"{template}, {note}" if note else template
