"""Base classes of the Lightning modules, and their optimizer with its learning-rate schedule."""
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
    """Return Lightning's dictionary for `optimizer`, with the learning-rate multiplier that the config describes."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    multiplier = instantiate_from_config(scheduler_config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=multiplier.schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def can_use_fused_optimizer(module: pl.LightningModule) -> bool:
    """Return whether Lightning can clip the gradients of a fused optimizer: in mixed precision it cannot."""
    trainer = module._trainer  # the property `trainer` raises if there is none
    if trainer is None or not trainer.gradient_clip_val:
        return True
    return "mixed" not in str(trainer.precision)


class ResumableModule(pl.LightningModule):
    """A module that refuses checkpoints of other models, and moves its averages once per optimizer step."""

    _last_averaged_step: int | None = None

    def saved_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the module's weights that its checkpoints hold; by default all."""
        return weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.saved_weights(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the weights of a checkpoint with those that this module would save.

        Raises:
            UserError: if weights are missing, unknown or of another shape, so the checkpoint is another model's.
        """
        ours = {key: tuple(value.shape) for key, value in self.saved_weights(self.state_dict()).items()}
        theirs = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        if differing:
            first = differing[0]
            raise UserError(f"--resume {self.trainer.ckpt_path}: belongs to another model than this config: "
                            f"{len(differing)} weights differ ({printable(first)}: {theirs.get(first, 'none')} in the "
                            f"checkpoint, {ours.get(first, 'none')} in the config's model); give the run's own config")

    def update_averages(self) -> None:
        """Move the exponential moving averages of weights, if the module keeps any, towards the current weights."""

    def on_train_start(self) -> None:
        self._last_averaged_step = self.global_step

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        # Of several micro-batches only the last one ends in an optimizer step.
        if self.global_step != self._last_averaged_step:
            self._last_averaged_step = self.global_step
            self.update_averages()


class SharedStepModule(ResumableModule):
    """A module whose validation computes and logs what its training does, under "val/" instead of "train/"."""

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Return the loss of a batch, and log its terms under `split`."""
        raise NotImplementedError

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch, "val")
