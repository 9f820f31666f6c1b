"""When a U-Net is accelerated: in training and in sampling on CUDA in 16 bits, and in no other case."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import build_model

from ldm.inference import PerfusionPipeline
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.training.callbacks import AccelerateFrozenUNet

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class ModelStandIn(SimpleNamespace):
    """A model that claims to be on a device, whether or not the machine has it."""


@pytest.fixture(autouse=True)
def restore_matmul_precision() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def model_on(device: torch.device, tmp_path: Path, **attributes: object) -> ModelStandIn:
    wrapper = build_model(tmp_path, use_ema=False).model.requires_grad_(False)
    return ModelStandIn(model=wrapper, device=device, betas=SimpleNamespace(device=device), **attributes)


def start_training(model: ModelStandIn, precision: str) -> None:
    AccelerateFrozenUNet().on_train_start(SimpleNamespace(precision=precision), model)


def is_accelerated(model: ModelStandIn) -> bool:
    return model.model.graphs is not None and model.model.diffusion_model.dtype != torch.float32


class TableEncoder(PromptEncoder):
    """A text encoder with nothing but a table, which may be trained."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(3, 2).requires_grad_(trained)

    def encode_embedded(self, embedded: torch.Tensor) -> torch.Tensor:
        return embedded


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_training_accelerates_frozen_text_encoders(tmp_path: Path, precision: str, trained: bool) -> None:
    model = model_on(CUDA, tmp_path, cond_stage_model=TableEncoder(trained))
    start_training(model, precision)
    assert (model.cond_stage_model.graphs is not None) == (precision == "bf16-mixed" and not trained)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "precision", "expected"), [
    (CUDA, "bf16-mixed", torch.bfloat16), (CUDA, "16-mixed", torch.float16), (CUDA, "32-true", None),
    (CPU, "bf16-mixed", None)])
def test_training_accelerates_on_cuda_with_mixed_precision(tmp_path: Path, device: torch.device, precision: str,
                                                           expected: torch.dtype | None) -> None:
    model = model_on(device, tmp_path)
    start_training(model, precision)
    assert is_accelerated(model) == (expected is not None)
    if expected is not None:
        assert model.model.diffusion_model.dtype == expected
        assert torch.get_float32_matmul_precision() == "high"


def test_trained_or_averaged_networks_are_not_accelerated(tmp_path: Path) -> None:
    averaged, trained = model_on(CUDA, tmp_path, use_ema=True), model_on(CUDA, tmp_path)
    trained.model.diffusion_model.out[-1].bias.requires_grad_(True)
    for model in (averaged, trained):
        start_training(model, "bf16-mixed")
        assert not is_accelerated(model)


@pytest.mark.slow
def test_dropout_prevents_graphs_only(tmp_path: Path) -> None:
    model = model_on(CUDA, tmp_path)
    model.model.diffusion_model.middle_block[0].out_layers[2].p = 0.1
    start_training(model, "bf16-mixed")
    assert model.model.graphs is None and model.model.diffusion_model.dtype == torch.bfloat16


def test_models_without_a_unet_are_left_alone() -> None:
    start_training(ModelStandIn(device=CUDA), "bf16-mixed")  # for example a first stage


@pytest.mark.slow
@pytest.mark.parametrize(("device", "precision", "weights", "expected"), [
    (CUDA, "autocast", {}, True), (CUDA, "full", {}, False), (CPU, "autocast", {}, False),
    (CUDA, "autocast", {"out.2.weight": torch.zeros(1)}, False)])
def test_sampling_accelerates_on_cuda_with_autocast(
        tmp_path: Path, device: torch.device, precision: str, weights: dict[str, torch.Tensor], expected: bool,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    model = model_on(device, tmp_path, cond_stage_model=TableEncoder(False))
    pipeline = PerfusionPipeline(model, precision=precision, accelerate=True)
    pipeline._accelerate_for([SimpleNamespace(weights=weights)])
    assert is_accelerated(model) == expected
    assert not expected or model.model.diffusion_model.dtype == torch.float16  # this GPU has no bfloat16


@pytest.mark.parametrize("ends_by_exception", [False, True])
def test_matmul_precision_is_restored_after_training(tmp_path: Path, ends_by_exception: bool) -> None:
    torch.set_float32_matmul_precision("highest")
    callback, model = AccelerateFrozenUNet(), model_on(CUDA, tmp_path)
    trainer = SimpleNamespace(precision="bf16-mixed")
    callback.on_train_start(trainer, model)
    assert torch.get_float32_matmul_precision() == "high"
    if ends_by_exception:
        callback.on_exception(trainer, model, KeyboardInterrupt())
    else:
        callback.teardown(trainer, model, "fit")
    assert torch.get_float32_matmul_precision() == "highest"
