"""Write the progress of a training run to a file that other programs can follow, one JSON object a line."""
from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from ldm.common.errors import UserError

NAME = "progress.jsonl"


class ProgressFile(pl.Callback):
    """Append `{"step", "steps", "loss", "time"}` to `progress.jsonl` in the log folder, after every few steps.

    A resumed run appends to the same file. Readers skip a last line that is not complete yet.

    Args:
        every: number of steps between two lines; the last step always has one.

    Raises:
        UserError: `every` is below 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"ProgressFile: every {every} must be 1 or more")
        self.every = every
        self.last_step = -1

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        self._write(trainer, None)

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, model: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step != self.last_step and (step % self.every == 0 or step == trainer.max_steps):
            self._write(trainer, trainer.callback_metrics.get("loss"))

    def _write(self, trainer: pl.Trainer, loss: Any) -> None:
        self.last_step = trainer.global_step
        value = None if loss is None or not math.isfinite(float(loss)) else round(float(loss), 5)
        entry = {"step": trainer.global_step, "steps": trainer.max_steps, "loss": value, "time": round(time.time(), 2)}
        with (Path(trainer.default_root_dir) / NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
