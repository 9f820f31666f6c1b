"""What every Lightning module here hands to the trainer as its optimiser."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.util import instantiate_from_config


def optimizer_and_schedule(optimizer: torch.optim.Optimizer, scheduler_config: Mapping[str, Any] | None
                           ) -> dict[str, Any]:
    """Lightning's dictionary for `optimizer`, its learning rate multiplied each step by what the config describes."""
    if scheduler_config is None:
        return {"optimizer": optimizer}
    factor = instantiate_from_config(scheduler_config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor.schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
