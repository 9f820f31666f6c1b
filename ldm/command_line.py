"""What the command lines of all scripts share: complaints of one line, numbers in their range, folders to write to.

Nothing here imports torch, so `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ldm.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and that takes no flag by half of its name."""

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def whole(least: int = 0, below: int | None = None) -> Callable[[str], int]:
    """A flag's type: a whole number from `least` up, and under `below` where that is given."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least or (below is not None and value >= below):
            most = "" if below is None else f" and less than {below}"
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more{most}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """A flag's type: a finite number from `least` to `most`, and larger than `above`."""
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", least), ("above", above), ("at most", most))
              if math.isfinite(bound)]

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds) or 'a finite number'}")
        return value

    return read


def quoted(*words: object) -> str:
    """Words of a command as the user's shell takes them: Windows knows no single quotes."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def check_folder(flag: str, folder: Path) -> None:
    """Raises a UserError where the `folder` of `flag` is none, or could not be made or written to; makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {folder}: {there} is no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {there} cannot be written to; choose another place")


def check_file(flag: str, file: Path) -> None:
    """Raises a UserError where the `file` of `flag` could not be written; makes nothing."""
    if file.is_dir():
        raise UserError(f"{flag} {file}: is a folder; name a file in it, such as {file / 'result.safetensors'}")
    check_folder(flag, file.parent)
