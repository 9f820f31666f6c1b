"""Progress of work that takes long: a bar in a terminal, and in a log file a line now and then."""
from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_LINE, NEXT_LINES = 5.0, 20.0  # seconds; work that is done sooner logs nothing


def show_progress(items: Iterable[T] | None = None, total: int | None = None, description: str = "", unit: str = "",
                  leave: bool = False, enabled: bool = True, in_terminals: bool = True) -> Any:
    """Return an object that counts: iterate over it, or call its `update`, in a `with` block.

    Args:
        items: what to iterate over; None: the caller counts by `update(n)`.
        total: number of items, if `items` does not say.
        description: what is done, such as "covariance".
        unit: what is counted, such as "captions".
        leave: keep the bar in the terminal.
        enabled: False shows nothing.
        in_terminals: False shows no bar: the work shows its own.
    """
    in_terminal = sys.stderr.isatty()
    if enabled and not in_terminal:
        return LoggedProgress(items, total, description, unit)
    return tqdm(items, total=total, desc=description, unit=f" {unit}" if unit else "it", leave=leave,
                disable=not (enabled and in_terminals))


class LoggedProgress(Generic[T]):
    """Logs a line after 5 s, and then every 20 s, such as "covariance: 2048 of 8192 captions, about 40 s left"."""

    def __init__(self, items: Iterable[T] | None, total: int | None, description: str, unit: str = "") -> None:
        self.items, self.description, self.unit = items, description, unit
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.done = 0
        self.start = time.monotonic()
        self.next_line = self.start + FIRST_LINE

    def __iter__(self) -> Iterator[T]:
        for item in self.items or ():
            yield item
            self.update()

    def __enter__(self) -> LoggedProgress[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count items that are done."""
        self.done += count
        now = time.monotonic()
        if now >= self.next_line and self.done != self.total:
            self.next_line = now + NEXT_LINES
            log.info("%s", self._line(now - self.start))

    def close(self) -> None:
        """End the work. There is nothing to clean up."""

    def _line(self, seconds: float) -> str:
        amount = f"{self.done} of {self.total}" if self.total else str(self.done)
        left = ""
        if self.total and self.done:
            left = f", about {_duration(seconds * (self.total - self.done) / self.done)} left"
        return f"{self.description}: {amount}{f' {self.unit}' if self.unit else ''}{left}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
