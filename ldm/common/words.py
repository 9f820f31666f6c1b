"""Compare words, and find and replace whole words, such as the placeholders of concepts, in prompts.

Words are equal if they are equal after Unicode's composition (NFC) and case folding: `<Bär>` and `<bär>`, however the
"ä" is typed. `fold_word` is that rule, and everything that compares words calls it.
"""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ldm.common.errors import UserError

VOWELS = tuple("aeiou")
ARTICLE = re.compile(r"\b(a)n? $", re.IGNORECASE)
QUOTES = "'\"`‘’‚“”„«»"
SEPARATORS = "|/;,+*&"  # of several words, in other tools


class FoundWord(NamedTuple):
    """A word found in a text: text[start:end] is the word at `index` of the list that was looked for."""

    start: int
    end: int
    index: int


def compose(text: str) -> str:
    """Return the text in Unicode's composed form (NFC), in which positions of `find_words` count."""
    return unicodedata.normalize("NFC", text)


def fold_word(word: str) -> str:
    """Return the form in which words are compared: composed (NFC) and without case. Words are equal if these are."""
    return _fold_letters(compose(word))


def _fold_letters(text: str) -> str:
    """Fold the case of each letter on its own, so that positions can be traced."""
    return "".join(map(str.casefold, text))


def find_words(text: str, words: Sequence[str]) -> Iterator[FoundWord]:
    """Yield the whole words in a composed text, from left to right; of two that overlap, the longer one counts.

    Args:
        text: as `compose` returns it.
        words: what to look for, compared as `fold_word` does.
    """
    if not words:
        return
    folded_words = list(map(fold_word, words))
    indices = sorted(range(len(words)), key=lambda index: -len(folded_words[index]))
    pattern = _any_word_pattern([folded_words[index] for index in indices])
    folded = _fold_letters(text)
    # A letter such as "ß" folds to two, so positions have to be traced back.
    origin = None if len(folded) == len(text) else [
        position for position, letter in enumerate(text) for _ in letter.casefold()] + [len(text)]
    for match in re.finditer(pattern, folded):
        start, end = match.span() if origin is None else (origin[match.start()], origin[match.end()])
        yield FoundWord(start, end, indices[match.lastindex - 1])


def split_at_placeholders(prompt: str, placeholders: Sequence[str]) -> list[str | int]:
    """Split a prompt at the placeholders in it, in upper or lower case; of two that overlap, the longer one counts.

    Returns:
        The parts of the prompt in order: texts, and the indices of placeholders. Blank texts are left out.
    """
    if not placeholders:
        return [prompt]
    prompt = compose(prompt)
    parts: list[str | int] = []
    end = 0
    for word in find_words(prompt, placeholders):
        parts += [prompt[end:word.start], word.index]
        end = word.end
    parts.append(prompt[end:])
    return [part for part in parts if isinstance(part, int) or part.strip()]


def replace_word(words: str, placeholder: str, text: str) -> str:
    """Return `text` with `words` in place of a placeholder, in upper or lower case.

    An article before it is adapted: "a {}" becomes "an owl", but "a <my-owl>". If the text may contain other
    placeholders, use `replace_words`, which knows where each one ends.
    """
    return replace_words({placeholder: words}, text)


def replace_words(words: Mapping[str, str | None], text: str) -> str:
    """Apply `replace_word` for several placeholders at once. A placeholder whose words are None stays unchanged."""
    text, placeholders = compose(text), list(words)
    result, end = "", 0
    for found in find_words(text, placeholders):
        new = words[placeholders[found.index]]
        if new is not None:
            result = _adapt_article(result + text[end:found.start], new) + new
            end = found.end
    return result + text[end:]


def spell_out(words: Mapping[str, str | None], text: str) -> str:
    """Return a prompt in plain words: super-categories in place of placeholders.

    As `replace_words`, but a super-category that stands beside its placeholder already is not written twice: "a <new1>
    cat" with the words "cat" is "a cat", and so are "a cat <new1>" and, with the plural, "<new1> cats".
    """
    text, placeholders = compose(text), list(words)
    result, end = "", 0
    for found in find_words(text, placeholders):
        new = words[placeholders[found.index]]
        if new is None:
            continue
        before = text[end:found.start] if found.start >= end else ""
        before = _without_words_before(before, new)
        after, plural = _words_after(text[found.end:], new)
        result = _adapt_article(result + before, new) + new + plural
        end = found.end + after
    return result + text[end:]


def _without_words_before(text: str, words: str) -> str:
    """Return the text without the words, or some of their first or last ones, at its end."""
    parts = compose(words).split()
    endings = [parts[first:] for first in range(len(parts))] + [parts[:last] for last in range(1, len(parts))]
    for ending in sorted(endings, key=len, reverse=True):
        match = re.search(rf"(?<!\w){_spaced_pattern(ending)}[\s-]+$", text, re.IGNORECASE)
        if match:
            return text[:match.start()]
    return text


def _words_after(text: str, words: str) -> tuple[int, str]:
    """Return how many letters the words, or their last ones, take at the start of a text, and the plural's ending."""
    parts = compose(words).split()
    for first in range(len(parts)):
        match = re.match(rf"[\s-]+{_spaced_pattern(parts[first:])}(e?s)?(?!\w)", text, re.IGNORECASE)
        if match:
            return match.end(), match[1] or ""
    return 0, ""


def _spaced_pattern(words: Sequence[str]) -> str:
    return r"[\s-]+".join(map(re.escape, words))


def _adapt_article(before: str, new: str) -> str:
    """Return the text before a word with its "a" or "an" as the word needs it."""
    article = ARTICLE.search(before)
    if article is None:
        return before
    end = "n " if new.lower().startswith(VOWELS) else " "
    return before[:article.start()] + article[1] + end


def super_category_words(text: str) -> str:
    """Return the words of a super-category in plain form: "teddy_bear" and "'teddy bear'" are "teddy bear".

    Raises:
        UserError: a character separates words, as in "teddy|bear", which says nothing about one subject.
    """
    words = " ".join(compose(text).replace("_", " ").split()).strip(QUOTES + " ")
    separator = next((letter for letter in words if letter in SEPARATORS), None)
    if separator is not None:
        example = " ".join(words.replace(separator, " ").split())
        raise UserError(f"super-category {text!r}: {separator!r} separates no words here; give plain words for one "
                        f"subject, such as \"{example}\", or one super-category for each concept")
    return words


def _any_word_pattern(words: Sequence[str]) -> str:
    """Return a pattern with one group per word. Pass longer words first: `sks-2` contains `sks`."""
    return "|".join(f"({_whole_word_pattern(word)})" for word in words)


def _whole_word_pattern(word: str) -> str:
    """Return a pattern that does not match `word` inside a longer word. `<x>` ends by itself, so `<x>s` contains it."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def with_article(phrase: str) -> str:
    """Return the phrase behind "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
