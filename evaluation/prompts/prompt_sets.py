"""Lists of prompts to evaluate concepts with, grouped by what they ask of a concept.

A file has one prompt per line, with one `{}` where the concept's word goes. A line `[style]` names the category of the
prompts below it. Lines that start with `#` are comments.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.common.errors import UserError
from ldm.common.words import replace_word
from ldm.data.templates import SLOT

PROMPT_DIR = Path(__file__).resolve().parent
MINI_PROMPTS, PHOTO_PROMPTS = PROMPT_DIR / "mini.txt", PROMPT_DIR / "photos.txt"
UNCATEGORIZED = "uncategorized"  # the category of prompts above the first heading
HEADING = re.compile(r"\[\s*(.*\S)\s*\]")


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt for any concept.

    Attributes:
        category: what it asks of the concept, such as "style".
        text: the prompt, with one `{}` for the concept's word.
    """

    category: str
    text: str

    def fill(self, words: str) -> str:
        """Return the prompt with `words` in place of `{}`: a placeholder or a super-category. Adapts "a" and "an"."""
        return replace_word(words, SLOT, self.text)


def read_prompts(path: str | Path) -> list[EvaluationPrompt]:
    """Return the prompts of a file, in its order; at least one.

    Raises:
        UserError: the file is missing, is not UTF-8 text or has no prompts, or a line has not exactly one `{}`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a text file with one prompt per line, such as "
                        f"{MINI_PROMPTS}") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text file in UTF-8; give one with one prompt per line") from None
    prompts = list(_parse(path, text))
    if not prompts:
        raise UserError(f'{path}: no prompts in it; write one per line, such as "a photo of a {SLOT} on the beach"')
    return prompts


def select_prompts(prompts: Sequence[EvaluationPrompt], limit: int) -> list[EvaluationPrompt]:
    """Return at most `limit` prompts, taken from the categories in turn, in the order of the file."""
    counts: dict[str, int] = {}
    ranked = []
    for index, prompt in enumerate(prompts):
        rank = counts.get(prompt.category, 0)  # 0 for the first prompt of its category, 1 for the second, ...
        counts[prompt.category] = rank + 1
        ranked.append((rank, index))
    selected = sorted(index for _, index in sorted(ranked)[:limit])
    return [prompts[index] for index in selected]


def _parse(path: str | Path, text: str) -> Iterator[EvaluationPrompt]:
    category = UNCATEGORIZED
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        heading = HEADING.fullmatch(line)
        if heading:
            category = heading[1]
        elif line and not line.startswith("#"):
            if line.count(SLOT) != 1:
                raise UserError(f"{path}, line {number}: {line!r} must have exactly one {SLOT}, for the concept's word")
            yield EvaluationPrompt(category, line)
