"""A callback that notes when a run's parts begin, for those who started the run."""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class Clock(pl.Callback):
    """Writes `path` at the end of training: seconds since the epoch of each step's start, and of when all was ready.

    Nothing waits for the device, so that a run is as fast as without it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.ready = 0.0
        self.starts: list[float] = []

    def on_fit_start(self, *_: Any) -> None:
        self.ready = time.time()

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.time())

    def on_train_end(self, *_: Any) -> None:
        self.path.write_text(json.dumps({"ready": self.ready, "starts": self.starts}))
