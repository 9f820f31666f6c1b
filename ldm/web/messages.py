"""Show the errors of users as messages of the page, in one line each."""
from __future__ import annotations

import functools
import html
import logging
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

import gradio as gr

from ldm.common.errors import MemoryShortage, UserError, is_out_of_memory

log = logging.getLogger(__name__)
P = ParamSpec("P")
MEMORY = "not enough memory; make fewer or smaller images at a time"
SECONDS = 15  # that a message stays


def user_errors(function: Callable[P, Any]) -> Callable[P, Any]:
    """Decorate the handler of an event: a `UserError` becomes a message, a bug a message and a traceback in the log."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise as_message(error) from None

    return wrapped


def as_message(error: Exception) -> gr.Error:
    """Return the message for an exception. Browsers show messages as HTML, so all texts are escaped."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, MemoryShortage | MemoryError) or is_out_of_memory(error):
        return _message(MEMORY)
    if isinstance(error, UserError):
        return _message(str(error))
    log.error("the page could not do this", exc_info=error)
    return _message(f"something went wrong ({type(error).__name__}); the terminal says more")


def as_html(lines: Iterable[str]) -> str:
    """Return lines of text as HTML."""
    return "<br>".join(html.escape(line) for line in lines)


def _message(text: str) -> gr.Error:
    return gr.Error(html.escape(" ".join(text.split()), quote=False), duration=SECONDS, print_exception=False)
