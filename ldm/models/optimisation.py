"""What the Lightning modules here share: one step for training and validation, an optimiser with its schedule."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.util import instantiate_from_config


def optimizer_and_schedule(optimizer: torch.optim.Optimizer, scheduler_config: Mapping[str, Any] | None
                           ) -> dict[str, Any]:
    """Lightning's dictionary for `optimizer`, its learning rate multiplied each step by what the config describes."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    factor = instantiate_from_config(scheduler_config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor.schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OneStepModule(pl.LightningModule):
    """A module whose validation computes and logs what its training does, under "val/" instead of "train/"."""

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """The loss of a batch, its numbers logged under `split`."""
        raise NotImplementedError

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "val")
