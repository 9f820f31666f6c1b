"""Concepts from several files, learned apart, as ones that can be used together in one prompt."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept, first_duplicate, is_placeholder, short


def rename_duplicates(concepts: Sequence[Concept], placeholders: Sequence[str] | None = None) -> list[Concept]:
    """Concepts that can be used together: all of one base model, each with a placeholder of its own.

    Args:
        concepts: of one file or of several, in order; they stay as they are, copies are renamed.
        placeholders: a name for each. None: they keep theirs, and where several have the same the first keeps it
            and the others become `<name-2>`, `<name-3>`, ...

    Raises:
        UserError: concepts of different base models, or placeholders that are too few, too many, equal or no words.
    """
    for concept in concepts:
        if concept.base != concepts[0].base:
            raise UserError(
                f"{concept.label} was trained on base model {short(concept.base)}, but {concepts[0].label} on "
                f"{short(concepts[0].base)}; only concepts of one base model can be merged"
            )
    names = _distinct([c.placeholder for c in concepts]) if placeholders is None else list(placeholders)
    _check_placeholders(names, len(concepts))
    return [replace(concept, placeholder=name) for concept, name in zip(concepts, names, strict=True)]


def _check_placeholders(names: Sequence[str], count: int) -> None:
    if len(names) != count:
        raise UserError(f"{len(names)} placeholders for {count} concepts; give one for each, in order")
    for name in names:
        if not is_placeholder(name):
            raise UserError(f"placeholder {name!r}: must be a word without white space, such as <my-teddy>")
    repeated = first_duplicate(names)
    if repeated is not None:
        raise UserError(f"placeholder {repeated} is given twice, where case does not count; give each concept its own")


def _distinct(words: Sequence[str]) -> list[str]:
    """The words, later equal ones (in any case, as prompts read them) numbered from 2 without taking another's name."""
    taken = {word.lower() for word in words}
    result: list[str] = []
    for word in words:
        if word.lower() in (earlier.lower() for earlier in result):
            word = next(name for name in _numbered(word) if name.lower() not in taken)
            taken.add(word.lower())
        result.append(word)
    return result


def _numbered(word: str) -> Iterator[str]:
    stem, end = (word[:-1], ">") if word.endswith(">") else (word, "")
    number = 2
    while True:
        yield f"{stem}-{number}{end}"
        number += 1
