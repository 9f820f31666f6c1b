"""Show the errors of users as messages of the page, in one line each."""
from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec

import gradio as gr

from ldm.common.errors import UserError, is_out_of_memory

log = logging.getLogger(__name__)
P = ParamSpec("P")
MEMORY = "not enough memory; make fewer or smaller images at a time"


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
    """Return the message for an exception."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        return gr.Error(" ".join(str(error).split()), duration=15, print_exception=False)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return gr.Error(MEMORY, duration=15, print_exception=False)
    log.exception("the page could not do this")
    return gr.Error(f"something went wrong ({type(error).__name__}); the terminal says more", print_exception=False)
