"""A callback that records when the steps of a training run start, for the benchmark that started the run."""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class StepClock(pl.Callback):
    """Write a JSON file at the end of training: when training was ready, and when each step started.

    Times are seconds since the epoch. The callback never waits for the device, so it does not slow down the run.
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
