"""Log folders of training runs, as main.py leaves them, made by hand."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def write_log_folder(run: Path, model: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, steps: int = 3,
               seed: int = 5) -> Path:
    """A run with its configs and a checkpoint."""
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 4, "train": {
        "target": "ldm.data.mini.scenes.SceneDataset", "params": {"seed": 2}}}}
    for name in ("configs", "checkpoints"):
        (run / name).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": dict(model), "data": data}), run / "configs" / "now-project.yaml")
    OmegaConf.save(OmegaConf.create({"lightning": {"seed": seed}}), run / "configs" / "now-lightning.yaml")
    torch.save({"state_dict": dict(tensors or {"weight": torch.zeros(1)}), "global_step": steps},
               run / "checkpoints" / "last.ckpt")
    return run


def write_scalars(run: Path, name: str, values: Sequence[float], start: float) -> None:
    """Numbers logged every tenth step, two seconds apart, in a TensorBoard file of their own that begins at `start`."""
    with SummaryWriter(run / "tensorboard", filename_suffix=f".{name.replace('/', '-')}.{start:.0f}") as writer:
        for place, value in enumerate(values):
            writer.add_scalar(name, value, 10 * (place + 1), walltime=start + 2 * place)
