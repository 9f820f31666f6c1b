"""Data loaders from a config, as the LDM family's YAML files describe them."""
from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ldm.common.dreambooth import mark_subject
from ldm.common.errors import UserError
from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.concept_photos import split_concept_configs
from ldm.util import default, instantiate_from_config

COUNT = "drawn"  # name of the count of batches in checkpoints


class ResumableSampler(Sampler[int]):
    """The order of an epoch's items, from item `start` on. It depends on (`seed`, `epoch`) alone.

    Args:
        length: number of items.
        shuffle: whether their order is random.
        seed: seed of the order.
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
    """A loader that continues at the batch where a checkpoint's run stopped. Lightning saves and restores the count.

    A dataset with a method `set_epoch`, such as `ConceptPhotos`, is told the epoch before its first batch.
    """

    batches_done = 0  # over all epochs

    def __iter__(self) -> Iterator[Any]:
        epoch, done = divmod(self.batches_done, len(self))
        if isinstance(self.sampler, ResumableSampler):  # on several devices Lightning replaces it by its own
            self.sampler.epoch, self.sampler.start = epoch, done * self.batch_size
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        for batch in super().__iter__():
            self.batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {COUNT: self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches_done = state[COUNT]


class MultiConceptLoader:
    """Batches of several concepts at once. Each is a dict: index of a concept's loader -> that loader's next batch.

    Every loader goes through its own epochs, in the order that it would have alone.

    Args:
        loaders: one per concept, two or more.
        concepts_per_batch: number of concepts in a batch; the others are in the next ones. None: all.
        rank: rank of this process. Process r reads loaders r, r + world_size, ...
        world_size: number of processes.
    """

    def __init__(self, loaders: Sequence[ResumableLoader], concepts_per_batch: int | None = None, rank: int = 0,
                 world_size: int = 1) -> None:
        own = list(enumerate(loaders))[rank::world_size]
        size = default(concepts_per_batch, len(own))
        self.groups = [own[first:first + size] for first in range(0, len(own), size)]
        self.rounds = min(map(len, loaders))  # per epoch, the same for every process
        self.batches_done = 0  # over all epochs

    def __len__(self) -> int:
        return len(self.groups) * self.rounds

    def __iter__(self) -> Iterator[dict[int, Any]]:
        count = len(self.groups)
        streams: list[dict[int, Iterator[Any]]] = []
        for group_index, group in enumerate(self.groups):
            group_done = math.ceil((self.batches_done - group_index) / count)
            streams.append({index: _batches_from(loader, group_done) for index, loader in group})
        for _ in range(len(self) - self.batches_done % len(self)):
            group_streams = streams[self.batches_done % count]
            self.batches_done += 1
            yield {index: next(stream) for index, stream in group_streams.items()}

    def state_dict(self) -> dict[str, int]:
        return {COUNT: self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches_done = state[COUNT]


def _batches_from(loader: ResumableLoader, batches_done: int) -> Iterator[Any]:
    """Yield the loader's batches after the first `batches_done`, one epoch after another, without end."""
    loader.batches_done = batches_done
    while True:
        yield from loader


class PairedDataset(Dataset):
    """Pairs of the items that two data sets have at the same index, as many as the shorter one has.

    Loaders make pairs of batches of them: for DreamBooth, of the subject's photos and the images of its class.
    """

    def __init__(self, first: Dataset, second: Dataset) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return min(len(self.first), len(self.second))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.first[index], self.second[index]


def prepare_worker(worker_id: int, rank: int) -> None:
    """Initialize a loader's worker process.

    The worker ignores Ctrl-C, which the terminal sends to every process: the main one handles it. Its random numbers
    are those that Lightning gives to workers after `seed_everything(workers=True)`. Of a streamed data set it reads
    its own part.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("PL_SEED_WORKERS") == "1":
        pl_worker_init_function(worker_id, rank)
    worker = get_worker_info()
    if worker is not None and isinstance(worker.dataset, Txt2ImgIterableBaseDataset) and worker.dataset.valid_ids:
        share = worker.dataset.num_records // worker.num_workers
        worker.dataset.sample_ids = worker.dataset.valid_ids[worker_id * share:(worker_id + 1) * share]


class DataModuleFromConfig(pl.LightningDataModule):
    """Loaders for the datasets that `train`, `validation`, `test` and `predict` describe.

    If the param `data_root` of `train` lists several folders, there is one training set per folder (see
    `split_concept_configs`). Their batches come together, in a `MultiConceptLoader`, and each device of a run has its
    own share of the concepts.

    Args:
        batch_size: items per batch; with several training sets, of each.
        train: config of the training set, with `target` and `params`.
        validation: likewise; its batches are in order and complete.
        test: as `validation`.
        predict: as `validation`.
        wrap: kept for the public configs; anything with a length and items is a data set here.
        num_workers: loader processes; None or 0 loads in the main process.
        shuffle_test_loader: whether the batches of `test` come in random order.
        use_worker_init_fn: kept for the public configs; workers always get random numbers of their own.
        shuffle_val_dataloader: whether the batches of `validation` come in random order.
        reg: config of DreamBooth's images of the class. A training batch is then a pair, of photos and of these.
        shuffle: whether training batches come in random order (with the seed of `seed_everything`).
        concepts_per_batch: number of training sets that have a batch in one pass through the model. This bounds the
            memory; a step still goes through all of them. None: all at once.

    Raises:
        UserError: a number is out of its range, or a training set does not fill one batch.
    """

    def __init__(self, batch_size: int, train: Mapping[str, Any] | None = None,
                 validation: Mapping[str, Any] | None = None, test: Mapping[str, Any] | None = None,
                 predict: Mapping[str, Any] | None = None, wrap: bool = False, num_workers: int | None = None,
                 shuffle_test_loader: bool = False, use_worker_init_fn: bool = False,
                 shuffle_val_dataloader: bool = False, reg: Mapping[str, Any] | None = None, shuffle: bool = True,
                 concepts_per_batch: int | None = None) -> None:
        super().__init__()
        if batch_size < 1 or default(num_workers, 0) < 0:
            raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: give at least 1 item, 0 workers")
        if concepts_per_batch is not None and concepts_per_batch < 1:
            raise UserError(f"concepts_per_batch {concepts_per_batch}: give 1 or more, or leave it out")
        self.concepts_per_batch = concepts_per_batch
        self.batch_size, self.num_workers, self.shuffle = batch_size, default(num_workers, 0), shuffle
        self.shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        configs = mark_subject({"train": train, "reg": reg, "validation": validation, "test": test, "predict": predict})
        self.dataset_configs = {name: config for name, config in configs.items() if config is not None}
        self.datasets: dict[str, Dataset | list[Dataset]] = {}
        # Lightning looks for these methods, so define only those that have a dataset.
        for name, method in (("train", "train_dataloader"), ("validation", "val_dataloader"),
                             ("test", "test_dataloader"), ("predict", "predict_dataloader")):
            if name in self.dataset_configs:
                setattr(self, method, lambda name=name: self._loader(name))

    def setup(self, stage: str | None = None) -> None:
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                configs = split_concept_configs(config) if name == "train" else [config]
                sets = [instantiate_from_config(one) for one in configs]
                self.datasets[name] = sets if len(sets) > 1 else sets[0]
        self._check_training_sets()

    def _check_training_sets(self) -> None:
        if "reg" in self.datasets and len(self.training_sets) != 1:
            raise UserError("reg: goes with one training set; name one folder of photos, or leave reg out")
        for dataset in [*self.training_sets, self.datasets.get("reg")]:
            if dataset is None or isinstance(dataset, IterableDataset):
                continue
            if len(dataset) < self.batch_size:  # an incomplete batch is left out, so there would be none
                raise UserError(f"{len(dataset)} training items do not fill a batch of {self.batch_size}; "
                                "lower data.params.batch_size")

    @property
    def training_sets(self) -> list[Dataset]:
        """The training sets: none, one, or one per concept."""
        sets = self.datasets.get("train", [])
        return sets if isinstance(sets, list) else [sets]

    @property
    def num_groups(self) -> int:
        """Number of batches in which each training set of this device has one."""
        share = math.ceil(len(self.training_sets) / self._process["world_size"])
        return math.ceil(share / default(self.concepts_per_batch, share))

    @property
    def _process(self) -> dict[str, int]:
        """Rank of this process and number of processes."""
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _loader(self, name: str) -> DataLoader | MultiConceptLoader:
        if name != "train":
            dataset = self.datasets[name]
            shuffle = self.shuffled.get(name, False) and not isinstance(dataset, IterableDataset)
            return DataLoader(dataset, self.batch_size, shuffle=shuffle, **self._worker_options)
        loaders = [self._training_loader(dataset) for dataset in self.training_sets]
        if len(loaders) == 1:
            return loaders[0]
        if self.num_groups > 1 and len(loaders) % self._process["world_size"]:
            raise UserError(f"concepts_per_batch {self.concepts_per_batch}: {len(loaders)} concepts cannot be shared "
                            f"evenly by {self._process['world_size']} devices; leave it out")
        return MultiConceptLoader(loaders, self.concepts_per_batch, **self._process)

    def _training_loader(self, dataset: Dataset) -> DataLoader:
        if isinstance(dataset, IterableDataset):
            return DataLoader(dataset, self.batch_size, **self._worker_options)
        if "reg" in self.datasets:
            dataset = PairedDataset(dataset, self.datasets["reg"])
        sampler = ResumableSampler(len(dataset), self.shuffle, torch.initial_seed())
        return ResumableLoader(dataset, self.batch_size, sampler=sampler, drop_last=True, **self._worker_options)

    @property
    def _worker_options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0,
                "worker_init_fn": functools.partial(prepare_worker, rank=self._process["rank"])}
