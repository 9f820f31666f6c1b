"""Data loaders from a config, as the LDM family's YAML files describe them."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler

from ldm.errors import UserError
from ldm.util import default, instantiate_from_config


class ResumableSampler(Sampler[int]):
    """The order of an epoch's items, a function of (`seed`, `epoch`) alone, from the item at `start` on.

    Args:
        length: how many items there are.
        shuffle: whether their order is random.
        seed: of the order.
    """

    def __init__(self, length: int, shuffle: bool, seed: int) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed + self.epoch * 1_000_003) % 2**63)
            order = torch.randperm(self.length, generator=generator)
        return iter(order[self.start:].tolist())


class ResumableLoader(DataLoader):
    """Batches that go on where a checkpoint's run stopped; Lightning keeps and restores their count."""

    drawn = 0  # batches so far, over all epochs

    def __iter__(self) -> Iterator[Any]:
        epoch, done = divmod(self.drawn, len(self))
        if isinstance(self.sampler, ResumableSampler):  # on several devices Lightning puts its own in place
            self.sampler.epoch, self.sampler.start = epoch, done * self.batch_size
        for batch in super().__iter__():
            self.drawn += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


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
        if batch_size < 1 or default(num_workers, 0) < 0:
            raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: give at least 1 item, 0 workers")
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
        count = len(self.datasets.get("train", range(self.batch_size)))
        if count < self.batch_size:  # the last, incomplete batch is left out: there would be none
            raise UserError(f"{count} training items do not fill a batch of {self.batch_size}; "
                            "lower data.params.batch_size")

    def _loader(self, name: str) -> DataLoader:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        if name != "train":
            return DataLoader(self.datasets[name], self.batch_size, **workers)
        sampler = ResumableSampler(len(self.datasets[name]), self.shuffle, torch.initial_seed())
        return ResumableLoader(self.datasets[name], self.batch_size, sampler=sampler, drop_last=True, **workers)
