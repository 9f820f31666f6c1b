"""Files of prompts: one format for generation, training previews and evaluation. Imports no torch.

One prompt per line, in UTF-8. `{}` is the concept's word. Blank lines, and lines that start with `#`, are left out. A
line `[style]` is a heading: it names the category of the prompts below it. A backslash before the first character of a
line makes it a prompt: `\\#1 mug`, `\\[style\\]`.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.common.errors import UserError
from ldm.common.text_files import read_text, split_lines
from ldm.common.words import fold_word, replace_word

SLOT = "{}"
COMMENT = "#"
HEADING = re.compile(r"\[\s*([^\[\]]*[^\[\]\s])\s*\]")
CONTENT = "one prompt per line"


class FilePrompt(NamedTuple):
    """A prompt of a file.

    Attributes:
        text: the prompt; `{}` stands for the concept's word.
        line: number of its line, from 1.
        category: the heading above it; None: there is none.
    """

    text: str
    line: int
    category: str | None = None


def read_prompt_file(path: str | Path, label: str | None = None) -> list[FilePrompt]:
    """Return the prompts of a file, in its order; at least one.

    Args:
        path: the file.
        label: names the file in errors; None: its path.

    Raises:
        UserError: there is no such file, it is no text in UTF-8, or it has no prompts.
    """
    label = str(path) if label is None else label
    category: str | None = None
    spellings: dict[str, str] = {}  # headings that differ only in case are one category
    prompts = []
    for number, line in enumerate(map(str.strip, split_lines(read_text(path, label, CONTENT))), start=1):
        heading = HEADING.fullmatch(line)
        if heading:
            category = spellings.setdefault(fold_word(heading[1]), heading[1])
        elif line and not line.startswith(COMMENT):
            text = line[1:] if line.startswith(f"\\{COMMENT}") else line
            prompts.append(FilePrompt(text, number, category))
    if not prompts:
        raise UserError(f"{label}: no prompts in it; write one per line")
    return prompts


def fill_slots(prompts: str | Sequence[str], placeholders: Sequence[str]) -> list[str]:
    """Return prompts with the placeholder of the only concept in place of each `{}`. "a" and "an" are adapted.

    Args:
        prompts: one or several, with or without `{}`.
        placeholders: those of all loaded concepts.

    Raises:
        UserError: a prompt has a `{}`, but there is no concept, or several.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    slotted = next((prompt for prompt in given if SLOT in prompt), None)
    if slotted is None:
        return given
    if len(placeholders) != 1:
        loaded = "none is loaded; load one (--concept), or write a word in its place"
        if placeholders:
            loaded = f"{len(placeholders)} are loaded; write {' or '.join(placeholders)} in its place"
        raise UserError(f"the prompt {slotted!r} has a {SLOT}, which stands for the concept's word, but {loaded}")
    return [replace_word(placeholders[0], SLOT, prompt) if SLOT in prompt else prompt for prompt in given]
