"""The one kind of error that a user of the command line is meant to see."""
from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that names the thing and the remedy."""


class MemoryShortage(UserError):
    """The device has no memory left for what the user asked for."""


def one_line_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Turns a `UserError` that leaves a script's main function into one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return wrapped
