"""Turn the errors that libraries raise for a user's values into errors of one line."""
from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ldm.common.errors import UserError

OWN_PACKAGES = ("ldm", "evaluation", "scripts")
DEVICE_ERRORS = ("CUDA", "cuDNN", "HIP", "MPS")  # messages that begin so are not caused by a user's value


@contextmanager
def user_error_for(what: str, *also: type[Exception]) -> Iterator[None]:
    """Turn errors that libraries raise for a user's values into a UserError that begins with `what`.

    Bugs of this project (see `_is_own_bug`), errors of the device, too little memory, and whatever a class of another
    project raises (see `call_foreign`) pass unchanged.

    Args:
        also: further exception types to turn into a UserError.
    """
    from torch import OutOfMemoryError

    try:
        yield
    except OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError, *also) as error:
        if str(error).startswith(DEVICE_ERRORS) or _is_own_bug(error) or _is_foreign(error):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{what} ({type(error).__name__}: {reason[:300]}); change them") from error


def _is_own_bug(error: Exception) -> bool:
    """Return whether an error arose in this project's code rather than in a library that the code calls.

    Call it in `user_error_for` only: it skips the two outermost frames, which are that function's and its caller's. An
    error without further frames was raised by the function that the caller called with the user's values.

    torch's operators leave no frame of their own. They raise plain RuntimeErrors, which this project's code never does.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][2:]
    if not frames or type(error) is RuntimeError:
        return False
    module = frames[-1].f_globals.get("__name__", "")
    return module.partition(".")[0] in OWN_PACKAGES


def call_foreign(target: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a class or function of another project. Its exceptions pass every `user_error_for` around the call."""
    return target(**given)


def _is_foreign(error: Exception) -> bool:
    """Return whether an error arose below `call_foreign`."""
    return any(frame.f_code is call_foreign.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
