"""Data loaders from a config, as the LDM family's YAML files describe them."""
from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.common.errors import UserError
from ldm.data.personalized import one_config_each
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


class SideBySide:
    """Batches of several loaders at once: each is a dict, the number of a loader -> its next batch.

    Every loader goes through its items as it would alone, whatever the lengths of the others are.

    Args:
        loaders: two or more.
        at_a_time: so many of them take part in a batch, the others in the next ones; None: all.
        rank, world: of so many processes each draws from its own share of the loaders.
    """

    def __init__(self, loaders: Sequence[ResumableLoader], at_a_time: int | None = None, rank: int = 0,
                 world: int = 1) -> None:
        own = list(enumerate(loaders))[rank::world]
        size = default(at_a_time, len(own))
        self.groups = [own[first:first + size] for first in range(0, len(own), size)]
        self.rounds = min(map(len, loaders))  # in an epoch, the same for every process
        self.drawn = 0  # batches so far, over all epochs

    def __len__(self) -> int:
        return len(self.groups) * self.rounds

    def __iter__(self) -> Iterator[dict[int, Any]]:
        turns = len(self.groups)
        streams = [{number: _from(loader, -((place - self.drawn) // turns)) for number, loader in group}
                   for place, group in enumerate(self.groups)]
        for _ in range(len(self) - self.drawn % len(self)):
            group = streams[self.drawn % turns]
            self.drawn += 1
            yield {number: next(stream) for number, stream in group.items()}

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def _from(loader: ResumableLoader, drawn: int) -> Iterator[Any]:
    """The loader's batches from that number on, one epoch after another."""
    loader.drawn = drawn
    while True:
        yield from loader


def prepare_worker(number: int, rank: int) -> None:
    """Prepares a loader's process: Ctrl-C, which the terminal sends to every process, is for the main one to answer.

    Random numbers are those that Lightning gives to workers, after `seed_everything` with `workers`, if they are
    prepared by nobody else.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("PL_SEED_WORKERS") == "1":
        pl_worker_init_function(number, rank)


class DataModuleFromConfig(pl.LightningDataModule):
    """Loaders for the datasets that `train`, `validation`, `test` and `predict` describe.

    Where the param `data_root` of `train` lists several folders, there is a training set for each (see
    `one_config_each`), and their batches come side by side.

    Args:
        batch_size: items per batch; of several training sets, of each.
        concepts_per_batch: so many training sets have a batch in one pass through the model, to bound the memory it
            takes, and a step goes through all of them; None: all at once.

    Several training sets are dealt out to the devices of a run, to each its own.
        num_workers: loader processes; None or 0 loads in the main process.
        wrap: kept for the public configs; datasets here have a length of their own.
        shuffle: whether training batches come in random order (of `seed_everything`'s seed).
    """

    def __init__(self, batch_size: int, train: Mapping[str, Any] | None = None,
                 validation: Mapping[str, Any] | None = None, test: Mapping[str, Any] | None = None,
                 predict: Mapping[str, Any] | None = None, wrap: bool = False, num_workers: int | None = None,
                 shuffle: bool = True, concepts_per_batch: int | None = None) -> None:
        super().__init__()
        if batch_size < 1 or default(num_workers, 0) < 0:
            raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: give at least 1 item, 0 workers")
        if concepts_per_batch is not None and concepts_per_batch < 1:
            raise UserError(f"concepts_per_batch {concepts_per_batch}: give 1 or more, or leave it out")
        self.concepts_per_batch = concepts_per_batch
        self.batch_size, self.num_workers, self.shuffle = batch_size, default(num_workers, 0), shuffle
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: config for name, config in given.items() if config is not None}
        self.datasets: dict[str, Dataset | list[Dataset]] = {}
        for name, method in (("train", "train_dataloader"), ("validation", "val_dataloader"),
                             ("test", "test_dataloader"), ("predict", "predict_dataloader")):
            if name in self.dataset_configs:
                setattr(self, method, lambda name=name: self._loader(name))

    def setup(self, stage: str | None = None) -> None:
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                sets = [instantiate_from_config(one) for one in (one_config_each(config) if name == "train"
                                                                 else [config])]
                self.datasets[name] = sets if len(sets) > 1 else sets[0]
        for dataset in self.training_sets:
            if len(dataset) < self.batch_size:  # the last, incomplete batch is left out: there would be none
                raise UserError(f"{len(dataset)} training items do not fill a batch of {self.batch_size}; "
                                "lower data.params.batch_size")

    @property
    def training_sets(self) -> list[Dataset]:
        """None, one, or one for each concept."""
        found = self.datasets.get("train", [])
        return found if isinstance(found, list) else [found]

    @property
    def turns(self) -> int:
        """How many batches a device takes until each of its training sets has had one."""
        share = -(-len(self.training_sets) // self._place["world"])
        return -(-share // default(self.concepts_per_batch, share))

    @property
    def _place(self) -> dict[str, int]:
        """Which of how many devices this is."""
        trainer = self.trainer
        return {"rank": 0, "world": 1} if trainer is None else {"rank": trainer.global_rank,
                                                                "world": trainer.world_size}

    def _loader(self, name: str) -> DataLoader | SideBySide:
        if name != "train":
            return DataLoader(self.datasets[name], self.batch_size, **self._workers)
        loaders = [self._training_loader(dataset) for dataset in self.training_sets]
        if len(loaders) == 1:
            return loaders[0]
        if self.turns > 1 and len(loaders) % self._place["world"]:
            raise UserError(f"concepts_per_batch {self.concepts_per_batch}: {len(loaders)} concepts cannot be shared "
                            f"evenly by {self._place['world']} devices; leave it out")
        return SideBySide(loaders, self.concepts_per_batch, **self._place)

    def _training_loader(self, dataset: Dataset) -> ResumableLoader:
        sampler = ResumableSampler(len(dataset), self.shuffle, torch.initial_seed())
        return ResumableLoader(dataset, self.batch_size, sampler=sampler, drop_last=True, **self._workers)

    @property
    def _workers(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0,
                "worker_init_fn": functools.partial(prepare_worker, rank=self._place["rank"])}
