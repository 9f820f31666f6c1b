"""Who gets a U-Net in 16 bits that is called by graphs: runs and samplings on CUDA that ask for 16 bits, no others."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import build_model

from ldm.inference.sampling import Sampling, quickened
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.training.callbacks import AccelerateFrozenUNet

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Stand(SimpleNamespace):
    """A model that says that it is on a device, whether or not there is one."""


@pytest.fixture(autouse=True)
def same_precision_afterwards() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def model(tmp_path: Path, device: torch.device, **attributes: object) -> Stand:
    network = build_model(tmp_path, use_ema=False).model.requires_grad_(False)
    return Stand(model=network, device=device, betas=SimpleNamespace(device=device), **attributes)


def is_quick(found: Stand) -> bool:
    return found.model.graphs is not None and found.model.diffusion_model.dtype != torch.float32


class Encoder(PromptEncoder):
    """One that has a table to be frozen or trained, and nothing else."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(3, 2).requires_grad_(trained)

    def encode_embedded(self, embedded: torch.Tensor) -> torch.Tensor:
        return embedded


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_text_encoders_of_runs(tmp_path: Path, precision: str, trained: bool) -> None:
    learner = model(tmp_path, CUDA, cond_stage_model=Encoder(trained))
    AccelerateFrozenUNet().on_train_start(SimpleNamespace(precision=precision), learner)
    assert (learner.cond_stage_model.graphs is not None) == (precision == "bf16-mixed" and not trained)


@pytest.mark.parametrize(("device", "precision", "expected"), [
    (CUDA, "bf16-mixed", torch.bfloat16), (CUDA, "16-mixed", torch.float16), (CUDA, "32-true", None),
    (CPU, "bf16-mixed", None)])
def test_runs(tmp_path: Path, device: torch.device, precision: str, expected: torch.dtype | None) -> None:
    learner = model(tmp_path, device)
    AccelerateFrozenUNet().on_train_start(SimpleNamespace(precision=precision), learner)
    assert is_quick(learner) == (expected is not None)
    if expected is not None:
        assert learner.model.diffusion_model.dtype == expected
        assert torch.get_float32_matmul_precision() == "high"


def test_runs_that_train_the_network_or_average_it(tmp_path: Path) -> None:
    averaging, training = model(tmp_path, CUDA, use_ema=True), model(tmp_path, CUDA)
    training.model.diffusion_model.out[-1].bias.requires_grad_(True)
    for learner in (averaging, training):
        AccelerateFrozenUNet().on_train_start(SimpleNamespace(precision="bf16-mixed"), learner)
        assert not is_quick(learner)


def test_dropout_leaves_out_the_graphs_alone(tmp_path: Path) -> None:
    learner = model(tmp_path, CUDA)
    learner.model.diffusion_model.middle_block[0].out_layers[2].p = 0.1
    AccelerateFrozenUNet().on_train_start(SimpleNamespace(precision="bf16-mixed"), learner)
    assert learner.model.graphs is None and learner.model.diffusion_model.dtype == torch.bfloat16


def test_runs_of_other_models(tmp_path: Path) -> None:
    AccelerateFrozenUNet().on_train_start(SimpleNamespace(precision="bf16-mixed"), Stand(device=CUDA))  # a first stage, say


@pytest.mark.parametrize(("device", "autocast", "weights", "expected"), [
    (CUDA, True, {}, True), (CUDA, False, {}, False), (CPU, True, {}, False),
    (CUDA, True, {"out.2.weight": torch.zeros(1)}, False)])
def test_samplings(tmp_path: Path, device: torch.device, autocast: bool, weights: dict[str, torch.Tensor],
                   expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    drawer = model(tmp_path, device)
    found = quickened(drawer, [SimpleNamespace(weights=weights)], Sampling((8, 8), autocast=autocast))
    assert found is drawer and is_quick(drawer) == expected
    assert not expected or drawer.model.diffusion_model.dtype == torch.float16  # as this GPU knows no bfloat16
