"""Data loaders from a config, as the LDM family's YAML files describe them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.errors import UserError
from ldm.util import default, instantiate_from_config


class DataModuleFromConfig(pl.LightningDataModule):
    """Loaders for the datasets that `train`, `validation`, `test` and `predict` describe.

    Args:
        batch_size: items per batch.
        num_workers: loader processes; None or 0 loads in the main process.
        wrap: kept for the public configs; datasets here have a length of their own.
        shuffle: whether training batches come in random order (of `seed_everything`'s seed).
    """

    def __init__(self, batch_size: int, train: Mapping[str, Any] | None = None,
                 validation: Mapping[str, Any] | None = None, test: Mapping[str, Any] | None = None,
                 predict: Mapping[str, Any] | None = None, wrap: bool = False, num_workers: int | None = None,
                 shuffle: bool = True) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.shuffle = batch_size, default(num_workers, 0), shuffle
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in given.items() if config is not None}
        self.datasets: dict[str, torch.utils.data.Dataset] = {}
        for name, method in (("train", "train_dataloader"), ("validation", "val_dataloader"),
                             ("test", "test_dataloader"), ("predict", "predict_dataloader")):
            if name in self.dataset_configs:
                setattr(self, method, lambda name=name: self._loader(name))

    def setup(self, stage: str | None = None) -> None:
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                self.datasets[name] = instantiate_from_config(config)

    def _loader(self, name: str) -> DataLoader:
        count = len(self.datasets[name])
        if name == "train" and count < self.batch_size:  # the last, incomplete batch is left out: there would be none
            raise UserError(f"{count} training items do not fill a batch of {self.batch_size}; "
                            "lower data.params.batch_size")
        return DataLoader(self.datasets[name], self.batch_size, shuffle=self.shuffle and name == "train",
                          num_workers=self.num_workers, drop_last=name == "train",
                          persistent_workers=self.num_workers > 0)
