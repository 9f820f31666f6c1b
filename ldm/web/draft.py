"""The run that is being prepared: its photos and the form beside them. It is a folder, so that a reload keeps it.

All tabs and devices that show the page share one draft.
"""
from __future__ import annotations

import json
import threading
from functools import partial
from typing import Any

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.web.run_folder import SETTINGS, RunFolder
from ldm.web.run_queue import RunQueue

FORM = "form.json"


class Draft:
    """The newest folder of the queue that has no settings yet.

    Args:
        queue: the runs of the page.
    """

    def __init__(self, queue: RunQueue) -> None:
        self.queue = queue
        self._lock = threading.Lock()

    def find(self) -> RunFolder | None:
        """Return the draft, or None if there is none."""
        runs = (run for run in self.queue.runs() if not (run.path / SETTINGS).exists() and run.photos.is_dir())
        return next(runs, None)

    def find_or_create(self) -> RunFolder:
        """Return the draft; a new one if there is none."""
        with self._lock:
            return self.find() or self.queue.create()

    def with_photos(self) -> RunFolder:
        """Return the draft.

        Raises:
            UserError: it has no photos.
        """
        run = self.find()
        if run is None or not any(run.photos.iterdir()):
            raise UserError("no photos yet; add some first")
        return run

    def discard(self) -> None:
        """Delete the draft."""
        run = self.find()
        if run is not None:
            self.queue.delete(run)

    def write_form(self, values: dict[str, Any]) -> None:
        """Keep the values of the form."""
        text = json.dumps(values)
        write_atomically(self.find_or_create().path / FORM, partial(_write_text, text=text))

    def read_form(self) -> dict[str, Any]:
        """Return the values of the form; empty if none are kept."""
        run = self.find()
        try:
            values = json.loads((run.path / FORM).read_text(encoding="utf-8")) if run is not None else {}
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


def _write_text(path: Any, text: str) -> None:
    path.write_text(text, encoding="utf-8")
