"""Find the words of concepts in prompts, and stand-ins for them that a CLIP tokenizer keeps in one piece.

Words match as everywhere in Perfusion: whole words, in upper or lower case, composed (Unicode NFC); of two that
overlap, the longer one counts.
"""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from .errors import PerfusionError

WORD_END = "</w>"  # of pieces in CLIP's vocabulary that end a word
MIN_LETTERS = 4


def replace_words(text: str, words: Sequence[str], replacement: Callable[[int], str]) -> str:
    """Return the text with `replacement(j)`, between spaces, in place of the j-th word; unchanged if it has none."""
    order = sorted(range(len(words)), key=lambda index: -len(words[index]))
    pattern = "|".join(f"({_whole_word(unicodedata.normalize('NFC', words[index]))})" for index in order)
    replaced, count = re.subn(pattern, lambda match: f" {replacement(order[match.lastindex - 1])} ",
                              unicodedata.normalize("NFC", text), flags=re.IGNORECASE)
    return replaced if count else text


def _whole_word(word: str) -> str:
    """Return a pattern for a word that is not part of a longer one; a bracket ends by itself, as in "<x>s"."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def markers(tokenizer: Any, text: str, count: int) -> dict[str, int]:
    """Return words that are one piece each to a CLIP tokenizer and do not occur in the text, with their token ids.

    Args:
        tokenizer: of `transformers`.
        text: a prompt.
        count: how many words are needed.
    """
    folded, found = text.casefold(), {}
    for token in range(len(tokenizer) - 1, -1, -1):
        if len(found) == count:
            break
        piece = tokenizer.convert_ids_to_tokens(token)
        word = piece.removesuffix(WORD_END)
        if word == piece or len(word) < MIN_LETTERS or not (word.isascii() and word.isalpha()) or word in folded:
            continue
        if tokenizer(word)["input_ids"][1:-1] == [token]:
            found[word] = token
    if len(found) < count:
        raise PerfusionError(f"the tokenizer of this CLIP has too few words for {count} concepts; load fewer")
    return found
