"""A lock that keeps two runs from writing to one folder at the same time."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.common.errors import UserError

LOCK_NAME = ".lock"


@contextmanager
def lock_folder(flag: str, folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist.

    The operating system holds the lock, so it is released however the process ends. A lock file that is left behind
    has no effect.

    Raises:
        UserError: if another process holds the lock.
    """
    from filelock import FileLock, Timeout  # comes with torch

    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(folder) / LOCK_NAME, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{flag} {folder}: another run is writing to this folder; wait for it, or choose another "
                        "folder") from None
