"""Read text files that people write: lines end at newlines only, and the encoding is UTF-8."""
from __future__ import annotations

import codecs
import re
from pathlib import Path

from ldm.common.errors import UserError

# Longer marks first: that of UTF-32 starts with that of UTF-16.
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
                    codecs.BOM_UTF16_BE: "UTF-16"}
NEWLINE = re.compile(r"\r\n|\n|\r")


def read_text(path: str | Path, label: str, content: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        label: names the file in errors, such as "--from-file prompts.txt".
        content: what it should hold, for errors, such as "one prompt per line".

    Raises:
        UserError: there is no such file, or it is no text in UTF-8.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{label}: {problem}; give a text file with {content}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror}); give a text file with {content}") from None
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if mark is not None:
        raise UserError(f"{label}: not a UTF-8 text file but one in {BYTE_ORDER_MARKS[mark]}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{label}: not a UTF-8 text file (see line {line}); save it as UTF-8, with {content}"
                        ) from None
    if "\0" in text:
        raise UserError(f"{label}: not a UTF-8 text file, since it has null characters; save it as UTF-8, with "
                        f"{content}")
    return text


def split_lines(text: str) -> list[str]:
    """Return the lines of a text. Unlike `str.splitlines`, this keeps characters such as U+2028 inside a line."""
    return NEWLINE.split(text)
