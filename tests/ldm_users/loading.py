"""Load a model as users of the LDM family do: a config of OmegaConf, a checkpoint of torch, strict=False."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config


def load_model(config_path: Path, checkpoint: Path | None = None) -> Any:
    """Return the model of a config in evaluation mode, with the weights of a checkpoint."""
    config = OmegaConf.load(config_path)
    model = instantiate_from_config(config.model)
    if checkpoint is not None:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert not [name for name in missing if "model_ema" not in name], missing
    return model.eval()
