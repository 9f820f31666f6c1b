"""Placeholders: the words that stand for concepts in prompts.

Prompts match placeholders as whole words and ignore case (`ldm.common.words`). Two placeholders that differ only in
case are therefore the same word.
"""
from __future__ import annotations

from collections.abc import Sequence

from ldm.common.errors import UserError
from ldm.common.words import fold_word, split_at_placeholders

PLACEHOLDER = r"<[^\s<>]+>"  # matches text in a prompt that is certainly meant as a placeholder


def is_placeholder(word: str) -> bool:
    """Return whether `word` can be a placeholder: it is not empty and contains no white space."""
    return word.split() == [word]


def find_duplicate(words: Sequence[str]) -> str | None:
    """Return the first word that repeats an earlier one, ignoring case, or None if all words differ."""
    seen: set[str] = set()
    for word in words:
        if fold_word(word) in seen:
            return word
        seen.add(fold_word(word))
    return None


def find_placeholders(texts: Sequence[str], placeholders: Sequence[str]) -> set[int]:
    """Return the indices of the placeholders that occur in at least one of the texts."""
    return {part for text in texts for part in split_at_placeholders(text, placeholders) if isinstance(part, int)}


def check_distinct(placeholders: Sequence[str]) -> None:
    """Raise UserError if two placeholders are the same word to a prompt."""
    if find_duplicate(placeholders) is not None:
        raise UserError(f"two concepts share a placeholder ({', '.join(placeholders)}; case is ignored); "
                        "give them different ones with merge_embeddings.py --placeholders")
