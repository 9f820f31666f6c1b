"""Lists of prompts to evaluate concepts with, by what they ask of a concept.

A file has a prompt a line, with one `{}` where the concept's word goes. A line `[style]` gives the category of the
prompts below it, a line that starts with `#` is a comment.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.common.errors import UserError
from ldm.common.words import replace_word
from ldm.data.templates import SLOT

PROMPTS = Path(__file__).resolve().parent / "prompts"
MINI, PHOTOS = PROMPTS / "mini.txt", PROMPTS / "photos.txt"
UNSORTED = "unsorted"  # the category of prompts that stand below no heading
HEADING = re.compile(r"\[\s*(.*\S)\s*\]")


@dataclass(frozen=True)
class EvaluationPrompt:
    """What to draw of a concept; `text` has one `{}` for it."""

    category: str
    text: str

    def about(self, words: str) -> str:
        """The prompt with the concept's placeholder or its super-category in the place of `{}`, as `replace_word` puts it."""
        return replace_word(words, SLOT, self.text)


def read_prompts(path: str | Path) -> list[EvaluationPrompt]:
    """The prompts of a file, in its order; at least one.

    Raises:
        UserError: the file is missing, no text in UTF-8 or without prompts, or a line has not exactly one `{}`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a text file with one prompt per line, such as {MINI}") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text file in UTF-8; give one with one prompt per line") from None
    prompts = list(_parsed(path, text))
    if not prompts:
        raise UserError(f'{path}: no prompts in it; write one per line, such as "a photo of a {SLOT} on the beach"')
    return prompts


def spread(prompts: Sequence[EvaluationPrompt], limit: int) -> list[EvaluationPrompt]:
    """So many prompts, of the categories in turn, in the order of the file."""
    ranks: dict[str, int] = {}
    order = []
    for place, prompt in enumerate(prompts):
        ranks[prompt.category] = ranks.get(prompt.category, -1) + 1
        order.append((ranks[prompt.category], place))
    return [prompts[place] for place in sorted(place for _, place in sorted(order)[:limit])]


def _parsed(path: str | Path, text: str) -> Iterator[EvaluationPrompt]:
    category = UNSORTED
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        heading = HEADING.fullmatch(line)
        if heading:
            category = heading[1]
        elif line and not line.startswith("#"):
            if line.count(SLOT) != 1:
                raise UserError(f"{path}, line {number}: {line!r} needs exactly one {SLOT}, where the concept's word "
                                "goes")
            yield EvaluationPrompt(category, line)
