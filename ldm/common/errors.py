"""The kind of error that users see as one line, and the way from an entry point's exceptions to that line."""
from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from ldm.common.threads import use_passive_waiting

P = ParamSpec("P")
OUT_OF_MEMORY_PHRASES = ("out of memory", "allocate memory")  # in the messages of torch, for any device
FAILED, INTERRUPTED = 2, 130  # exit statuses; shells use 130 for Ctrl-C
OWN_LOGGERS = ("ldm", "evaluation", "scripts", "__main__")  # they inform the user; libraries only warn
DEBUG_VARIABLE = "PERFUSION_DEBUG"


class UserError(Exception):
    """An input of the user's cannot be used. The message is one line that names the input and the remedy."""


class FileNotWritten(UserError):
    """A file cannot be written: its folder or the disk does not allow it."""


class MemoryShortage(UserError):
    """The device has too little memory for what the user requested."""


def brief_reason(error: Exception | str, limit: int = 200) -> str:
    """Return a library's message in one line. A long one ends after a sentence or a word, never within an address."""
    text = " ".join(str(error).split())
    if len(text) <= limit:
        return text
    start = text[:limit + 1]
    sentence, word = start.rfind(". ") + 1, start.rfind(" ")
    return start[:sentence] if sentence > limit // 3 else f"{start[:max(word, 0)]} ..."


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a library ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in message for phrase in OUT_OF_MEMORY_PHRASES)


def show_tracebacks() -> None:
    """Print full tracebacks from now on, in this process and in those that it starts."""
    os.environ[DEBUG_VARIABLE] = "1"


def tracebacks_shown() -> bool:
    """Return whether `PERFUSION_DEBUG` asks for full tracebacks."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def set_log_level(level: int) -> None:
    """Set the level of the project's own loggers."""
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)


def one_line_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Decorate the main function of an entry point, so that mistakes of the user end in one line on stderr.

    The exit status is 2 for a `UserError` or too little memory, and 130 for Ctrl-C. Other exceptions are bugs and pass
    with their traceback. With `PERFUSION_DEBUG=1` (or `--debug`) the traceback precedes the line.

    Decorating also lets idle threads sleep (see `use_passive_waiting`): entry points are decorated before they import
    torch.
    """
    use_passive_waiting()

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        set_log_level(logging.INFO)
        try:
            main(*args, **kwargs)
        except UserError as error:
            _exit(str(error), FAILED)
        except KeyboardInterrupt:
            _exit("stopped by Ctrl-C; finished files are kept", INTERRUPTED)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition(".")[0]
            _exit(f"out of memory ({reason}); request fewer or smaller images at a time, or choose another device "
                  "with --device", FAILED)

    return wrapped


def _exit(message: str, status: int) -> NoReturn:
    """Print `message` as one line and exit. Call it while an exception is handled."""
    if tracebacks_shown():
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
