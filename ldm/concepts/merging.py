"""Make concepts that were trained separately usable together in one prompt.

Nothing is computed here: concepts are checked, and renamed if their placeholders collide. The prompt encoders then
combine Perfusion's concepts (`ldm.concepts.stacking`) and merge the weights of others (`ldm.concepts.weight_merging`).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.fingerprint import base_label, check_same_family, same_base
from ldm.concepts.placeholders import find_duplicate, is_placeholder
from ldm.concepts.weight_merging import check_weights_merge


def merge_concepts(concepts: Sequence[AnyConcept], placeholders: Sequence[str] | None = None) -> list[AnyConcept]:
    """Return concepts that can be used together, renamed as `rename_duplicates` does.

    Words, such as embeddings of Textual Inversion, go together with concepts of any method.

    Args:
        concepts: concepts of one file or of several, in order.
        placeholders: see `rename_duplicates`.

    Raises:
        UserError: the concepts are of different methods or base models, or replace weights that cannot be merged.
    """
    others = [concept for concept in concepts if not concept.is_word]
    for concept in others[1:]:
        first = others[0]
        if concept.method != first.method:
            raise UserError(f"{first.label} was learned by {first.method_label}, {concept.label} by "
                            f"{concept.method_label}; only concepts of one method can be used together")
        check_weights_merge(first, concept)
    return rename_duplicates(concepts, placeholders)


def rename_duplicates(concepts: Sequence[AnyConcept], placeholders: Sequence[str] | None = None) -> list[AnyConcept]:
    """Return copies of the concepts, each with its own placeholder.

    Args:
        concepts: concepts of one family of base models, in order; they are not modified.
        placeholders: a new placeholder for each. None: concepts keep theirs; if several have the same, the first keeps
            it and the others become `<name-2>`, `<name-3>`, ...

    Raises:
        UserError: the base models are of different families, or the number of placeholders is wrong, or placeholders
            are equal or invalid. (Concepts of different fine-tunes pass; they cannot be saved to one file.)
    """
    for concept in concepts:
        check_same_family(concept, concepts[0])
    names = list(placeholders or ())
    if placeholders is None:
        names = _number_duplicates([concept.placeholder for concept in concepts])
    _check_placeholders(names, len(concepts))
    return [replace(concept, placeholder=name, **same_base(concept, concepts[0]))
            for concept, name in zip(concepts, names, strict=True)]


def check_one_base(concepts: Sequence[AnyConcept]) -> None:
    """Raise UserError if concepts that are to be one file were taught on different fine-tunes."""
    of_some_base = [concept for concept in concepts if not concept.fits_any_base]
    for concept in of_some_base[1:]:
        first = of_some_base[0]
        if concept.base != first.base:
            raise UserError(f"{concept.label} was taught on {base_label(concept)}, {first.label} on "
                            f"{base_label(first)}; a file holds concepts of one base model, but txt2img takes "
                            "several files")


def _check_placeholders(names: Sequence[str], count: int) -> None:
    if len(names) != count:
        raise UserError(f"{len(names)} placeholders for {count} concepts; give one for each, in order")
    for name in names:
        if not is_placeholder(name):
            raise UserError(f"placeholder {name!r}: must be a word without white space, such as <my-teddy>")
    duplicate = find_duplicate(names)
    if duplicate is not None:
        raise UserError(f"placeholder {duplicate} is given twice (case is ignored); give each concept its own")


def _number_duplicates(words: Sequence[str]) -> list[str]:
    """Return the words, with repeated ones numbered from 2. No numbered word equals another word, ignoring case."""
    taken = {fold_word(word) for word in words}
    seen: set[str] = set()
    result: list[str] = []
    for word in words:
        if fold_word(word) in seen:
            word = next(name for name in _numbered(word) if fold_word(name) not in taken)
            taken.add(fold_word(word))
        seen.add(fold_word(word))
        result.append(word)
    return result


def _numbered(word: str) -> Iterator[str]:
    """Yield `<name-2>`, `<name-3>`, ... for `<name>`."""
    stem, end = (word[:-1], ">") if word.endswith(">") else (word, "")
    number = 2
    while True:
        yield f"{stem}-{number}{end}"
        number += 1
