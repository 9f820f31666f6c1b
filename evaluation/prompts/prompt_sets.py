"""Lists of prompts to evaluate concepts with, grouped by what they ask of a concept.

`ldm.common.prompt_file` describes the format of the files. Each prompt has one `{}` where the concept's word goes, and
the headings are the categories.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.common.errors import UserError
from ldm.common.prompt_file import SLOT, read_prompt_file
from ldm.common.words import replace_word

PROMPT_DIR = Path(__file__).resolve().parent
MINI_PROMPTS, PHOTO_PROMPTS = PROMPT_DIR / "mini.txt", PROMPT_DIR / "photos.txt"
UNCATEGORIZED = "uncategorized"  # the category of prompts above the first heading


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
    prompts = []
    for prompt in read_prompt_file(path):
        if prompt.text.count(SLOT) != 1:
            raise UserError(f"{path}, line {prompt.line}: {prompt.text!r} must have exactly one {SLOT}, for the "
                            "concept's word")
        prompts.append(EvaluationPrompt(prompt.category or UNCATEGORIZED, prompt.text))
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
