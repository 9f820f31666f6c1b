"""The one kind of error that a user of the command line is meant to see."""
from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")
SHORT = ("out of memory", "allocate memory")  # in what libraries say, of any device
INTERRUPTED = 130  # the exit status that shells have for Ctrl-C
OWN_LOGGERS = ("ldm", "evaluation", "scripts", "__main__")  # what they tell is for the user; libraries only warn


class UserError(Exception):
    """Something the user gave cannot be used; the message is one line that names the thing and the remedy."""


class MemoryShortage(UserError):
    """The device has no memory left for what the user asked for."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library has found too little memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORT))


def set_log_level(level: int) -> None:
    """Has the project's own loggers tell what is of this level or above."""
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)


def one_line_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Turns a `UserError` that leaves a script's main function, or what is like one, into one line on stderr.

    The exit status is then 2, after Ctrl-C 130.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        set_log_level(logging.INFO)
        try:
            main(*args, **kwargs)
        except UserError as error:
            _leave(str(error), 2)
        except KeyboardInterrupt:
            _leave("stopped by Ctrl-C; what was finished before stays", INTERRUPTED)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _leave(f"memory is too short for this ({str(error).partition('.')[0]}); ask for fewer or smaller pictures "
                   "at a time, or for another device with --device", 2)

    return wrapped


def _leave(message: str, status: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
