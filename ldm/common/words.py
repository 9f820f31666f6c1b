"""Find and replace whole words, such as the placeholders of concepts, in prompts."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

VOWELS = tuple("aeiou")


def split_at_placeholders(prompt: str, placeholders: Sequence[str]) -> list[str | int]:
    """The prompt cut at whole placeholders (any case, the longest first): texts, and the numbers of placeholders."""
    if not placeholders:
        return [prompt]
    numbers = sorted(range(len(placeholders)), key=lambda number: -len(placeholders[number]))
    pattern = _any_of([placeholders[number] for number in numbers])
    parts: list[str | int] = []
    done = 0
    for found in re.finditer(pattern, prompt, flags=re.IGNORECASE):
        parts += [prompt[done:found.start()], numbers[found.lastindex - 1]]
        done = found.end()
    return [part for part in [*parts, prompt[done:]] if isinstance(part, int) or part.strip()]


def _any_of(words: Sequence[str]) -> str:
    """A pattern for any of the words, whole, with a group for each; longer ones come first: `sks-2` contains `sks`."""
    return "|".join(f"({whole_word(word)})" for word in words)


def whole_word(word: str) -> str:
    """A pattern for `word` that does not match inside a longer word; `<x>` ends by itself, so `<x>s` contains it."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def replace_word(words: str, placeholder: str, text: str) -> str:
    """`text` with `words` where a placeholder stands, in any case; "a {}" becomes "an owl", but "a <my-owl>".

    Where others may stand in the text as well, `replace_words` tells them apart.
    """
    return replace_words({placeholder: words}, text)


def replace_words(words: Mapping[str, str | None], text: str) -> str:
    """`replace_word` for each of some placeholders, found as in prompts; one whose words are None stays as it is."""
    if not words:
        return text
    placeholders = sorted(words, key=len, reverse=True)

    def instead(found: re.Match[str]) -> str:
        new = words[placeholders[found.lastindex - 2]]  # the first group is the article
        if new is None:
            return found[0]
        ending = "n " if new.lower().startswith(VOWELS) else " "
        return (found[1][0] + ending if found[1] else "") + new

    return re.sub(rf"(\ban? )?(?:{_any_of(placeholders)})", instead, text, flags=re.IGNORECASE)
