"""The argument parser and the number types that all command lines share.

Imports no torch, so that `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from ldm.common.errors import UserError


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
