"""Exponential moving averages of weights in training and validation."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_latent_diffusion import images, pixel_model
from test_vq import VQ_LOSS
from test_vq import build_model as build_vq_model

from ldm.models.diffusion.ddpm import DDPM


def test_averages_move_with_each_step_and_apply_in_ema_scope() -> None:
    model = pixel_model(use_ema=True)
    line = model.model.diffusion_model
    with torch.no_grad():
        line.slope.fill_(1.7)
    model.on_train_batch_end(None, None, 0)
    average = 0.7 + (1 - 2 / 11) * 1.0  # the decay of the first update is (1 + 1) / (10 + 1)
    assert float(model.model_ema.diffusion_modelslope) == pytest.approx(average)
    with model.ema_scope():
        assert float(line.slope) == pytest.approx(average)
    assert float(line.slope) == pytest.approx(1.7)


def test_validation_logs_weights_and_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, float] = {}
    for use_ema in (False, True):
        model = pixel_model(use_ema=use_ema)
        slopes = []
        monkeypatch.setattr(model, "log_dict", lambda numbers, **_: logged.update(numbers))
        monkeypatch.setattr(model, "apply_model", lambda x, t, cond, model=model, slopes=slopes: slopes.append(
            float(model.model.diffusion_model.slope)) or x)
        with torch.no_grad():
            model.model.diffusion_model.slope.fill_(9.0)
        model.eval().validation_step({"image": images(channels=2)}, 0)
        assert slopes == [9.0] + [pytest.approx(0.7)] * use_ema
        assert logged.keys() >= {"val/loss_simple", "val/loss_simple_ema"}


def test_ema_scope_without_averages_changes_nothing() -> None:
    model = pixel_model()
    model.on_train_batch_end(None, None, 0)
    with model.ema_scope():
        assert float(model.model.diffusion_model.slope) == pytest.approx(0.7)


def fit(model: pl.LightningModule, folder: Path, **settings: Any) -> None:
    batches = torch.utils.data.DataLoader([{"image": images(channels=2)}] * 6, batch_size=None)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=folder, **settings)
    trainer.fit(model, batches)


@pytest.mark.parametrize(("micro_batches", "steps"), [(1, 6), (2, 3), (4, 2)])  # the last step may have fewer batches
def test_averages_move_once_per_optimizer_step(tmp_path: Path, micro_batches: int, steps: int) -> None:
    model = pixel_model(use_ema=True)
    fit(model, tmp_path, max_epochs=1, accumulate_grad_batches=micro_batches)
    assert model.global_step == steps and int(model.model_ema.num_updates) == steps


@pytest.mark.slow
def test_averages_of_a_first_stage_move_once_per_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                ) -> None:
    model = build_vq_model(lossconfig=VQ_LOSS, use_ema=True)
    monkeypatch.setattr(model, "setup", lambda stage: None)  # the loss has no perceptual network here
    batches = torch.utils.data.DataLoader([{"image": torch.rand(1, 3, 16, 16)}] * 4, batch_size=None)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=tmp_path, max_epochs=1,
                         accumulate_grad_batches=2)
    trainer.fit(model, batches)
    assert int(model.model_ema.num_updates) == 2


def log_of_validation(model: DDPM, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    logged: dict[str, float] = {}
    monkeypatch.setattr(model, "log_dict", lambda terms, **_: logged.update(terms))
    model.eval().validation_step({"image": images(channels=2)}, 0)
    return logged


def test_validation_compares_weights_and_averages_at_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """While averages equal the weights, so do their losses."""
    logged = log_of_validation(pixel_model(use_ema=True), monkeypatch)
    assert logged["val/loss_ema"] == logged["val/loss"]
    assert logged["val/loss_simple_ema"] == logged["val/loss_simple"]


@pytest.mark.parametrize("use_ema", [False, True])
def test_validation_of_averages_leaves_the_random_numbers_of_training_alone(use_ema: bool,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    model = pixel_model(use_ema=use_ema)
    torch.manual_seed(3)
    model.shared_step({"image": images(channels=2)})
    expected = torch.rand(4)
    torch.manual_seed(3)
    log_of_validation(model, monkeypatch)
    assert torch.equal(torch.rand(4), expected)


def test_random_numbers_continue_after_an_error_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def failing() -> Iterator[None]:
        torch.rand(9)
        raise KeyError
        yield

    model = pixel_model(use_ema=True)
    torch.manual_seed(3)
    model.shared_step({"image": images(channels=2)})
    expected = torch.rand(4)
    torch.manual_seed(3)
    monkeypatch.setattr(model, "ema_scope", failing)
    with pytest.raises(KeyError):
        log_of_validation(model, monkeypatch)
    assert torch.equal(torch.rand(4), expected)
