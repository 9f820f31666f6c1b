"""The argument parser and the number types that all command lines share.

Imports no torch, so that `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ldm.common.errors import UserError, show_tracebacks


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, accepts no abbreviated flags, and knows `--debug`."""

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("-d", "--debug", action=ShowTracebacks, help="print the full traceback of an error "
                          "(the same as PERFUSION_DEBUG=1)")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class ShowTracebacks(argparse.Action):
    """The action of `--debug`. It leaves nothing in the namespace."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, *_: Any) -> None:
        show_tracebacks()


def int_in_range(least: int = 0, below: int | None = None) -> Callable[[str], int]:
    """Return a flag's type: a whole number from `least` up, and less than `below` if that is given."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (below is not None and value >= below):
            most = "" if below is None else f" and less than {below}"
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more{most}")
        return value

    return read


def float_in_range(least: float = -math.inf, most: float = math.inf, above: float = -math.inf
                   ) -> Callable[[str], float]:
    """Return a flag's type: a finite number from `least` to `most`, and larger than `above`."""
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", least), ("above", above), ("at most", most))
              if math.isfinite(bound)]

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds) or 'a finite number'}")
        return value

    return read
