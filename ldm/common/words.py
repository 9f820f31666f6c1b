"""Find and replace whole words, such as the placeholders of concepts, in prompts."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

VOWELS = tuple("aeiou")


def split_at_placeholders(prompt: str, placeholders: Sequence[str]) -> list[str | int]:
    """Split a prompt at the placeholders in it, in upper or lower case; of two that overlap, the longer one counts.

    Returns:
        The parts of the prompt in order: texts, and the indices of placeholders. Blank texts are left out.
    """
    if not placeholders:
        return [prompt]
    indices = sorted(range(len(placeholders)), key=lambda index: -len(placeholders[index]))
    pattern = _any_word_pattern([placeholders[index] for index in indices])
    parts: list[str | int] = []
    end = 0
    for match in re.finditer(pattern, prompt, flags=re.IGNORECASE):
        parts += [prompt[end:match.start()], indices[match.lastindex - 1]]
        end = match.end()
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
    if not words:
        return text
    placeholders = sorted(words, key=len, reverse=True)

    def replacement(match: re.Match[str]) -> str:
        new = words[placeholders[match.lastindex - 2]]  # the first group is the article
        if new is None:
            return match[0]
        if not match[1]:
            return new
        article_end = "n " if new.lower().startswith(VOWELS) else " "
        return match[1][0] + article_end + new

    return re.sub(rf"(\ban? )?(?:{_any_word_pattern(placeholders)})", replacement, text, flags=re.IGNORECASE)


def _any_word_pattern(words: Sequence[str]) -> str:
    """Return a pattern with one group per word. Pass longer words first: `sks-2` contains `sks`."""
    return "|".join(f"({whole_word_pattern(word)})" for word in words)


def whole_word_pattern(word: str) -> str:
    """Return a pattern that does not match `word` inside a longer word. `<x>` ends by itself, so `<x>s` contains it."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"
