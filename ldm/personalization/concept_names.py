"""The words of the concepts of a run: placeholders, super-categories, and the names of their files."""
from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from ldm.common.errors import UserError
from ldm.common.words import compose, fold_word, super_category_words
from ldm.concepts.placeholders import is_placeholder

log = logging.getLogger(__name__)


def as_list(words: str | Sequence[str]) -> list[str]:
    """Return a single text as a list of one, and a sequence of texts as a list."""
    return [words] if isinstance(words, str) else list(words)


def check_distinct_placeholders(placeholders: Sequence[str]) -> None:
    """Raise UserError if a placeholder is not a single word, or if two are equal up to case."""
    folded = list(map(fold_word, placeholders))
    for placeholder in placeholders:
        if not is_placeholder(placeholder):
            raise UserError(f"placeholder {placeholder!r}: must be a word without white space, such as <my-teddy>")
        if folded.count(fold_word(placeholder)) > 1:
            raise UserError(f"placeholder {placeholder} is given twice (case does not count); "
                            "name each concept by a word of its own with --placeholder")


def super_category_of_each(super_categories: Sequence[str], placeholders: Sequence[str]) -> list[str]:
    """Return one super-category per placeholder, in plain words. A single super-category serves all of them.

    Raises:
        UserError: there are several super-categories, but not as many as placeholders, or one holds a separator of
            words, such as "|".
    """
    if len(super_categories) not in (1, len(placeholders)):
        raise UserError(f"{len(super_categories)} super-categories ({', '.join(super_categories)}) for "
                        f"{len(placeholders)} concepts ({', '.join(placeholders)}); give one for all, or one each")
    normalized = list(map(super_category_words, super_categories))
    for given, words in zip(super_categories, normalized, strict=True):
        if words != " ".join(given.split()):
            log.info("super-category %r is read as %r", given, words)
    return normalized if len(normalized) > 1 else normalized * len(placeholders)


def file_names_for(placeholders: Sequence[str]) -> list[str]:
    """Return the names of concepts in files and logs, such as "my-teddy" for `<my-teddy>`.

    If two names were equal or one were empty, all of them get a number in front: "0-teddy", "1-teddy".
    """
    names = [re.sub(r"[^\w-]", "", compose(placeholder)) for placeholder in placeholders]
    are_distinct = all(names) and len({fold_word(name) for name in names}) == len(names)
    return names if are_distinct else [f"{index}-{name}".rstrip("-") for index, name in enumerate(names)]
