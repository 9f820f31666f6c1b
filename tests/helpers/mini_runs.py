"""Log folders of training runs, as main.py leaves them."""
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
    """Write the configs and a checkpoint of a run; return its folder."""
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
    """Write values of every tenth step, two seconds apart, to their own TensorBoard file, from `start` on."""
    with SummaryWriter(run / "tensorboard", filename_suffix=f".{name.replace('/', '-')}.{start:.0f}") as writer:
        for index, value in enumerate(values):
            writer.add_scalar(name, value, 10 * (index + 1), walltime=start + 2 * index)
