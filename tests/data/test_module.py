"""Loaders: batches, their order, epochs and resumption."""
from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import _auto_add_worker_init_fn
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ldm.common.errors import UserError
from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.module import DataModuleFromConfig


class Numbers(Dataset):
    def __init__(self, count: int = 10, offset: int = 0) -> None:
        self.count, self.offset = count, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return self.offset + index


class Seeds(Numbers):
    """Each item is the random seed of the process that loads it."""

    def __getitem__(self, index: int) -> int:
        return torch.initial_seed()


class Interrupted(Seeds):
    """The process gets Ctrl-C while it loads an item."""

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def numbers(**params: Any) -> dict[str, Any]:
    return {"target": "test_module.Numbers", "params": params}


def prepared(**settings: Any) -> DataModuleFromConfig:
    module = DataModuleFromConfig(4, **settings)
    module.setup("fit")
    return module


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_training_batches_are_full_and_shuffled() -> None:
    loader = prepared(train=numbers(count=10)).train_dataloader()
    first, second = batches(loader), batches(loader)
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [4, 4] and len(set(sum(epoch, []))) == 8
    assert first != second
    assert batches(prepared(train=numbers(), shuffle=False).train_dataloader()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return batches(prepared(train=numbers(count=40)).train_dataloader())

    assert order(1) == order(1) != order(2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_loader_continues_where_another_stopped(before: int, workers: int) -> None:
    torch.manual_seed(0)
    straight = prepared(train=numbers(count=9)).train_dataloader()
    expected = [batch for _ in range(3) for batch in batches(straight)]
    module = prepared(train=numbers(count=9), num_workers=workers)
    stopped, resumed = module.train_dataloader(), module.train_dataloader()
    got: list[list[int]] = []
    while len(got) < before:
        for batch in stopped:
            got.append(batch.tolist())
            if len(got) == before:
                break
    resumed.load_state_dict(stopped.state_dict() if before else {"drawn": 0})
    assert len(straight) == len(resumed) == 2
    while len(got) < len(expected):
        got += batches(resumed)
    assert got == expected


@pytest.mark.slow
@pytest.mark.parametrize(("start", "seeded"), [("fork", "0"), ("fork", "1"), ("spawn", "1")])
def test_workers_ignore_ctrl_c(start: str, seeded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", seeded)
    own = {"target": "test_module.Interrupted", "params": {"count": 8}}
    loader = prepared(train=own, num_workers=1).train_dataloader()
    loader.multiprocessing_context = start
    usual = DataLoader(Seeds(8), 4, num_workers=1)
    _auto_add_worker_init_fn(usual, rank=0)  # as Lightning prepares workers that nobody else does
    found = []
    for one in (loader, usual):
        torch.manual_seed(0)
        found.append(batches(one))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "loader"),
    [("validation", "val_dataloader"), ("test", "test_dataloader"), ("predict", "predict_dataloader")],
)
def test_other_batches_are_in_order_and_complete(name: str, loader: str) -> None:
    module = prepared(**{name: numbers(count=6, offset=100)})
    assert batches(getattr(module, loader)()) == [[100, 101, 102, 103], [104, 105]]


@pytest.mark.parametrize(("option", "name", "loader"), [
    ("shuffle_val_dataloader", "validation", "val_dataloader"), ("shuffle_test_loader", "test", "test_dataloader")])
def test_other_batches_are_shuffled_on_request(option: str, name: str, loader: str) -> None:
    module = prepared(**{name: numbers(count=40), option: True})
    numbers_in_order = sum(batches(getattr(module, loader)()), [])
    assert numbers_in_order != sorted(numbers_in_order) == list(range(40))


# DreamBooth: a training batch is a pair


def test_batches_with_regularization_images() -> None:
    module = prepared(train=numbers(count=12), reg=numbers(count=9, offset=100), shuffle=False)
    pairs = [(subject.tolist(), images.tolist()) for subject, images in module.train_dataloader()]
    assert pairs == [([0, 1, 2, 3], [100, 101, 102, 103]), ([4, 5, 6, 7], [104, 105, 106, 107])]


def test_the_subject_of_dreambooth_has_its_identifier(photos: dict[str, Any]) -> None:
    params = {"data_root": photos["params"]["data_root"], "size": 16, "set": "train", "placeholder_token": "dog"}
    train = {"target": photos["target"], "params": params}
    module = prepared(train=train, reg={**train, "params": {**params, "reg": True}})
    subject, images = next(iter(module.train_dataloader()))
    assert set(subject["caption"]) == {"photo of a sks dog"} and set(images["caption"]) == {"photo of a dog"}
    assert subject["image"].shape == images["image"].shape == (4, 16, 16, 3)
    assert "reg" not in params  # the given config stays as it is


# Streamed data sets


class Stream(Txt2ImgIterableBaseDataset):
    def __init__(self) -> None:
        super().__init__(num_records=8, valid_ids=list(range(8)))

    def __iter__(self) -> Iterator[int]:
        return iter(self.sample_ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_a_streamed_data_set(workers: int) -> None:
    module = prepared(train={"target": "test_module.Stream"}, num_workers=workers)
    assert batches(module.train_dataloader()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_lightning_sees_only_the_loaders_that_have_a_dataset() -> None:
    class Counter(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: dict[str, int] = {"train": 0, "val": 0}

        def training_step(self, batch: Sized, batch_idx: int) -> torch.Tensor:
            self.seen["train"] += len(batch)
            return self.weight.sum()

        def validation_step(self, batch: Sized, batch_idx: int) -> None:
            self.seen["val"] += len(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for given, expected in (({}, 0), ({"validation": numbers(count=3)}, 3)):
        model = Counter()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, DataModuleFromConfig(4, train=numbers(count=8), **given))
        assert model.seen == {"train": 8, "val": expected}


def test_training_sets_smaller_than_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="3 training items do not fill a batch of 4"):
        prepared(train=numbers(count=3)).train_dataloader()
    assert len(prepared(validation=numbers(count=3)).val_dataloader()) == 1


def test_setting_up_twice_keeps_the_datasets() -> None:
    module = prepared(train=numbers())
    dataset = module.datasets["train"]
    module.setup("test")
    assert module.datasets["train"] is dataset


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Any]:
    """The config of a training set of five photos, whose epoch has three batches."""
    for index in range(5):
        Image.effect_noise((16, 16), 20 + index).save(tmp_path / f"{index}.png")
    return {"target": "ldm.data.personalized.PersonalizedBase",
            "params": {"data_root": str(tmp_path), "size": 16, "repeats": 3, "seed": 3}}


def captions_and_flips(batch: dict[str, Any]) -> list[tuple[str, bool, int]]:
    return list(zip(batch["caption"], batch["flipped"].tolist(), batch["index"].tolist(), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_every_epoch_has_its_own_captions_and_flips(photos: dict[str, Any], workers: int) -> None:
    module = prepared(train=photos, num_workers=workers, shuffle=False)
    loader, dataset = module.train_dataloader(), ConceptPhotos(**photos["params"])
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        expected = [(item["caption"], item["flipped"], item["index"]) for item in (dataset[i] for i in range(12))]
        epochs.append([row for batch in loader for row in captions_and_flips(batch)])
        assert epochs[-1] == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_has_the_captions_of_its_epoch(photos: dict[str, Any], workers: int) -> None:
    torch.manual_seed(0)
    straight = prepared(train=photos).train_dataloader()
    expected = [captions_and_flips(batch) for _ in range(3) for batch in straight]
    resumed = prepared(train=photos, num_workers=workers).train_dataloader()
    resumed.load_state_dict({"drawn": 4})
    assert [captions_and_flips(batch) for _ in range(2) for batch in resumed] == expected[4:]


def test_each_of_several_concepts_has_its_own_epochs(photos: dict[str, Any], tmp_path: Path) -> None:
    """The second folder has twice the photos, so its epochs are twice as long."""
    (tmp_path / "more").mkdir()
    for index in range(10):
        Image.effect_noise((16, 16), 20 + index).save(tmp_path / "more" / f"{index}.png")
    folders = [str(tmp_path), str(tmp_path / "more")]
    both = {**photos, "params": {**photos["params"], "data_root": folders, "placeholder_token": ["<a>", "<b>"]}}
    torch.manual_seed(0)
    loader = prepared(train=both).train_dataloader()
    together = [batch for _ in range(4) for batch in loader]
    for index, (folder, word) in enumerate(zip(folders, ("<a>", "<b>"), strict=True)):
        one = {**photos, "params": {**photos["params"], "data_root": folder, "placeholder_token": word}}
        torch.manual_seed(0)
        alone = prepared(train=one).train_dataloader()
        expected = [captions_and_flips(batch) for _ in range(4) for batch in alone][:len(together)]
        assert [captions_and_flips(batch[index]) for batch in together] == expected
