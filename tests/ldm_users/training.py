"""Train a model of a user's own config with Lightning, the learning rate beside target and params."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from ldm.util import instantiate_from_config


class Photos(Dataset):
    """Random photos (H, W, 3) in [-1, 1] with a caption each."""

    def __init__(self, size: int, count: int = 4) -> None:
        self.photos = torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.photos[index], "caption": f"photo {index}"}


class Recorder(pl.Callback):
    """Seeds each step by its number, and keeps what the model logged after it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(config_path: Path, steps: int = 2, size: int = 16) -> tuple[Any, list[dict[str, float]]]:
    """Return the model after some steps, and the values logged at each of them."""
    config = OmegaConf.load(config_path)
    model = instantiate_from_config(config.model)
    model.learning_rate = config.model.base_learning_rate
    recorder = Recorder()
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[recorder], logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, DataLoader(Photos(size), batch_size=2, shuffle=False))
    return model, recorder.steps
