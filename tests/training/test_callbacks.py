"""Callbacks: Ctrl-C, what Lightning sets for all of torch, configs and images in the log folder."""
from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.training.callbacks import CUDACallback, ImageLogger, SetupCallback, StopAfterStep
from ldm.training.trainer import restored_torch_settings

TRAINER = SimpleNamespace(global_step=3)


@pytest.fixture(autouse=True)
def restore_handler() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_is_handled_once_in_the_main_thread() -> None:
    before, callback = signal.getsignal(signal.SIGINT), StopAfterStep()
    callback.on_train_start(TRAINER, None)
    assert signal.getsignal(signal.SIGINT) is not before
    signal.raise_signal(signal.SIGINT)
    assert callback.last_step == 3 and signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_ctrl_c_alone() -> None:
    before, callback, errors = signal.getsignal(signal.SIGINT), StopAfterStep(), []

    def start_training() -> None:
        try:
            callback.on_train_start(TRAINER, None)
        except ValueError as error:  # "signal only works in main thread of the main interpreter"
            errors.append(error)

    thread = threading.Thread(target=start_training)
    thread.start()
    thread.join()
    assert not errors and signal.getsignal(signal.SIGINT) is before


def test_an_exception_gives_ctrl_c_back() -> None:
    before, callback = signal.getsignal(signal.SIGINT), StopAfterStep()
    callback.on_train_start(TRAINER, None)
    callback.on_exception(TRAINER, None, RuntimeError())
    assert signal.getsignal(signal.SIGINT) is before


def test_settings_of_torch_are_restored_after_a_run() -> None:
    with pytest.raises(KeyError), restored_torch_settings():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


# The callbacks of the LDM family's main.py


class Painter(pl.LightningModule):
    """A model whose only work is to show images; it has a user's signature of `log_images`."""

    def __init__(self, images: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.images, self.calls = images, []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log_images(self, batch: Any, split: str = "", **options: Any) -> dict[str, torch.Tensor]:
        self.calls.append((split, options, self.training))
        return self.images


class StrictPainter(Painter):
    def log_images(self, batch: Any, split: str = "", n_row: int = 1) -> dict[str, torch.Tensor]:
        return super().log_images(batch, split, n_row=n_row)


def fit(model: pl.LightningModule, callback: pl.Callback, folder: Path, steps: int = 9) -> None:
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=-1,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                         callbacks=[callback])
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4, 1)))


def logged_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in (folder / "images" / "train").glob("*.png"))


@pytest.mark.parametrize(("params", "expected"), [
    ({"increase_log_steps": False}, [4, 8]), ({}, [1, 2, 4, 8]), ({"disabled": True}, []), ({"max_images": 0}, []),
    ({"increase_log_steps": False, "log_first_step": True}, [1, 4, 8]),
    ({"increase_log_steps": False, "log_on_batch_idx": True, "batch_frequency": 3}, [4, 8])])
def test_the_steps_that_are_shown(tmp_path: Path, params: dict[str, Any], expected: list[int]) -> None:
    fit(Painter({"x": torch.zeros(1, 3, 4, 4)}), ImageLogger(**{"batch_frequency": 4, **params}), tmp_path)
    assert logged_steps(tmp_path) == expected


@pytest.mark.parametrize(("rescale", "level"), [(True, 191), (False, 128)])
def test_images_of_every_shape(tmp_path: Path, rescale: bool, level: int) -> None:
    images = {"batch": torch.full((3, 3, 128, 128), 0.5), "grid": torch.full((3, 128, 128), 0.5),
              "grey": torch.full((1, 1, 128, 128), 0.5)}
    fit(Painter(images), ImageLogger(1, max_images=2, rescale=rescale), tmp_path, steps=1)
    widths = {}
    for name in images:
        sheet = np.asarray(Image.open(tmp_path / "images" / "train" / f"{name}_gs-000001.png"))
        assert sheet[60, 60].tolist() == pytest.approx([level] * 3, abs=1)
        widths[name] = sheet.shape[1] // 128
    assert widths == {"batch": 2, "grid": 1, "grey": 1}


def test_what_models_are_asked_for(tmp_path: Path) -> None:
    images = {"x": torch.zeros(1, 3, 4, 4)}
    free, strict = Painter(images), StrictPainter(images)
    for model in (free, strict):
        fit(model, ImageLogger(1, max_images=3, log_images_kwargs={"n_row": 2}), tmp_path, steps=1)
    assert free.calls == [("train", {"N": 3, "n_row": 2}, False)]
    assert strict.calls == [("train", {"n_row": 2}, False)] and strict.training


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_configs_are_kept_with_a_run(tmp_path: Path, make: Any) -> None:
    callback = SetupCallback("", "now", tmp_path, tmp_path / "checkpoints", tmp_path / "configs",
                             make({"model": {"target": "a"}}), make({"trainer": {"max_steps": 1}}))
    fit(Painter({}), callback, tmp_path, steps=1)
    assert OmegaConf.load(tmp_path / "configs" / "now-project.yaml") == {"model": {"target": "a"}}
    assert OmegaConf.load(tmp_path / "configs" / "now-lightning.yaml") == {"lightning": {"trainer": {"max_steps": 1}}}
    assert (tmp_path / "configs" / "now-machine.json").is_file() and (tmp_path / "checkpoints").is_dir()


def test_seconds_of_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Painter({}), CUDACallback(), tmp_path, steps=4)
    assert "epoch: " in caplog.text
