"""What the Lightning modules here share: one step for training and validation, an optimiser with its schedule."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoints.pickled import printable
from ldm.common.errors import UserError
from ldm.util import instantiate_from_config


def optimizer_and_schedule(optimizer: torch.optim.Optimizer, scheduler_config: Mapping[str, Any] | None
                           ) -> dict[str, Any]:
    """Lightning's dictionary for `optimizer`, its learning rate multiplied each step by what the config describes."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    factor = instantiate_from_config(scheduler_config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor.schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def can_use_fused_optimizer(module: pl.LightningModule) -> bool:
    """Whether its optimiser may be a fused one: Lightning clips no gradients of those in mixed precision."""
    trainer = module._trainer  # the property complains where there is none
    return trainer is None or not (trainer.gradient_clip_val and "mixed" in str(trainer.precision))


class ResumableModule(pl.LightningModule):
    """A module that goes on from checkpoints of its own kind only."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the weights of a checkpoint with those that this module would save.

        Raises:
            UserError: some are missing, unknown here or of another shape, so that it is another model's.
        """
        own = {"state_dict": self.state_dict()}
        self.on_save_checkpoint(own)
        ours, theirs = ({key: tuple(value.shape) for key, value in state["state_dict"].items()}
                        for state in (own, checkpoint))
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if differing:
            first = differing[0]
            raise UserError(f"--resume {self.trainer.ckpt_path}: is of another model than this config's: "
                            f"{len(differing)} weights differ ({printable(first)}: {theirs.get(first, 'none')} in the "
                            f"checkpoint, {ours.get(first, 'none')} in the config's model); give the run's own config")


class SharedStepModule(ResumableModule):
    """A module whose validation computes and logs what its training does, under "val/" instead of "train/"."""

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """The loss of a batch, its numbers logged under `split`."""
        raise NotImplementedError

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "val")
