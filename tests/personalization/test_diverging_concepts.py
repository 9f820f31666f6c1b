"""Several concepts in one run: divergence, clipping and 16-bit overflows of one do not touch the others."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import tiny_models
from helpers.tiny_concepts import write_base
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.data.module import DataModuleFromConfig
from ldm.personalization.base import PersonalizationMethod
from ldm.personalization.concept_gradients import clip_norm_of_each
from ldm.personalization.perfusion import Perfusion
from ldm.training.concept_callbacks import BeforeDuringAfter, ConceptSaver
from ldm.util import instantiate_from_config

SUBJECTS = {"<toy>": "cat", "<mug>": "mug", "<hat>": "hat"}
WORDS = list(SUBJECTS)
STEPS = 4
Change = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two photos of noise for each concept."""
    path = tmp_path_factory.mktemp("diverging")
    write_base(path)
    for seed, word in enumerate(WORDS):
        (path / word).mkdir()
        for number, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(path / word / f"{number}.png")
    return path


class ChangeConcept(pl.Callback):
    """Changes the concept at `index` before a step, or after its backward pass."""

    def __init__(self, index: int, change: Change, step: int = 1, after_backward: bool = False) -> None:
        self.index, self.change, self.step, self.after_backward = index, change, step, after_backward

    def on_train_batch_start(self, trainer: pl.Trainer, model: Perfusion, *_: object) -> None:
        if trainer.global_step == self.step and not self.after_backward:
            with torch.no_grad():
                self.change(model.concepts[self.index])

    def on_after_backward(self, trainer: pl.Trainer, model: Perfusion) -> None:
        if trainer.global_step == self.step and self.after_backward:
            self.change(model.concepts[self.index])


def train(folder: Path, root: Path, words: list[str], *callbacks: pl.Callback, **settings: Any) -> Perfusion:
    model: Perfusion = instantiate_from_config(tiny_models.latent_diffusion_config(
        folder, "perfusion.Perfusion", super_category=[SUBJECTS[word] for word in words], placeholder=words, seed=3,
        ckpt_path=str(folder / "base.ckpt"), first_stage_key="image",
        covariance=str(folder / "covariance.safetensors")))
    params = {"data_root": [str(folder / word) for word in words], "placeholder_token": words, "size": 16,
              "repeats": 16, "templates": list(tiny_models.TEMPLATES)}
    torch.manual_seed(7)  # the order of the photos
    data = DataModuleFromConfig(2, train={"target": "ldm.data.personalized.PersonalizedBase", "params": params})
    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
                         callbacks=[*callbacks, ConceptSaver("float32")], **settings)
    trainer.fit(model, datamodule=data)
    return model


def train_alone(folder: Path, root: Path, word: str, *callbacks: pl.Callback, **settings: Any) -> Concept:
    train(folder, root / f"alone {word}", [word], *callbacks, **settings)
    return load_perfusion_concepts(root / f"alone {word}" / "concept.safetensors")[0]


def assert_same(ours: Concept, theirs: Concept) -> None:
    for (name, value), (_, other) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.allclose(value, other, rtol=1e-3, atol=1e-4 * float(other.abs().max())), name


# Divergence


def embedding_overflows(concept: nn.Module) -> None:
    concept.embedding.fill_(1e30)


def outputs_are_nan(concept: nn.Module) -> None:
    concept.target_outputs_v[2].fill_(torch.nan)


def outputs_overflow(concept: nn.Module) -> None:
    for output in concept.target_outputs_v:
        output.fill_(1e38)


@pytest.mark.slow
@pytest.mark.parametrize("change", [embedding_overflows, outputs_are_nan, outputs_overflow])
def test_a_diverged_concept_leaves_the_others_as_alone(folder: Path, tmp_path: Path, change: Change) -> None:
    with pytest.raises(UserError, match=r"mug\.safetensors: .*<mug>.*diverged") as error:
        train(folder, tmp_path, WORDS, ChangeConcept(1, change))
    assert "\n" not in str(error.value) and "toy" not in str(error.value)
    assert not (tmp_path / "mug.safetensors").exists()
    for word in ("<toy>", "<hat>"):
        (ours,) = load_perfusion_concepts(tmp_path / f"{word[1:-1]}.safetensors")
        assert_same(ours, train_alone(folder, tmp_path, word))


@pytest.mark.slow
@pytest.mark.parametrize("change", [embedding_overflows, outputs_are_nan])
def test_a_run_whose_only_concept_diverged_is_refused_by_name(folder: Path, tmp_path: Path, change: Change) -> None:
    with pytest.raises(UserError, match=r"concept\.safetensors: .*<mug>.*diverged"):
        train(folder, tmp_path, ["<mug>"], ChangeConcept(0, change))


@pytest.mark.slow
def test_logged_means_are_of_the_concepts_that_have_not_diverged(folder: Path, tmp_path: Path) -> None:
    logged: dict[str, list[float]] = {}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            for name, value in trainer.logged_metrics.items():
                logged.setdefault(name, []).append(float(value))

    with pytest.raises(UserError, match="diverged"):
        train(folder, tmp_path, WORDS, ChangeConcept(1, embedding_overflows), Record())
    assert np.isnan(logged["train/loss/mug"][-1])
    others = [logged[f"train/loss/{name}"][-1] for name in ("toy", "hat")]
    assert logged["train/loss"][-1] == pytest.approx(np.mean(others))


@pytest.mark.slow
def test_a_diverged_concept_gets_no_previews(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    previews = BeforeDuringAfter(["a {}"], during=0, num_inference_steps=1)
    with pytest.raises(UserError, match="diverged"):
        train(folder, tmp_path, WORDS[:2], ChangeConcept(1, embedding_overflows), previews)
    assert "no previews of mug (after): its training has diverged" in caplog.messages
    assert list(previews.sheets[0])[-1] == "after" and "after" not in previews.sheets[1]


# Clipping


def test_the_gradient_norm_of_each_concept_is_clipped_separately() -> None:
    concepts = [nn.ParameterList([torch.zeros(3), torch.zeros(2)]) for _ in range(2)]
    for scale, concept in zip((1.0, 100.0), concepts, strict=True):
        for parameter in concept:
            parameter.grad = torch.full_like(parameter, scale)
    clip_norm_of_each([list(concept) for concept in concepts], 5.0)
    norms = [torch.stack([parameter.grad.norm() for parameter in concept]).norm().item() for concept in concepts]
    assert norms == pytest.approx([5 ** 0.5, 5.0], rel=1e-4)


@pytest.mark.slow
def test_clipped_concepts_come_out_as_alone(folder: Path, tmp_path: Path) -> None:
    clipping = {"gradient_clip_val": 1e-3}
    train(folder, tmp_path, WORDS[:2], **clipping)
    (ours,) = load_perfusion_concepts(tmp_path / "toy.safetensors")
    assert_same(ours, train_alone(folder, tmp_path, "<toy>", **clipping))


# 16 bits


class ScaledPrecision(MixedPrecision):
    """A gradient scaler as in "16-mixed", with 32-bit arithmetic, so that a CPU can test it."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def gradients_overflow(concept: nn.Module) -> None:
    concept.embedding.grad.fill_(torch.inf)


@pytest.mark.slow
def test_an_overflow_skips_the_step_of_one_concept_alone(folder: Path, tmp_path: Path) -> None:
    precision = ScaledPrecision()
    overflow = ChangeConcept(1, gradients_overflow, after_backward=True)
    train(folder, tmp_path, WORDS, overflow, plugins=[precision])
    assert precision.scaler.get_scale() == 512.0
    for word in WORDS:
        (ours,) = load_perfusion_concepts(tmp_path / f"{word[1:-1]}.safetensors")
        overflow.index = 0
        callbacks = [overflow] if word == "<mug>" else []
        theirs = train_alone(folder, tmp_path, word, *callbacks, plugins=[ScaledPrecision()])
        assert_same(ours, theirs)


@pytest.mark.slow
def test_an_overflow_of_all_concepts_skips_the_step(folder: Path, tmp_path: Path) -> None:
    precision = ScaledPrecision()
    overflows = [ChangeConcept(index, gradients_overflow, after_backward=True) for index in range(2)]
    train(folder, tmp_path, WORDS[:2], *overflows, plugins=[precision])
    assert precision.scaler.get_scale() == 512.0


@pytest.mark.slow
def test_parameters_of_each_concept_are_those_that_are_trained(folder: Path, tmp_path: Path) -> None:
    model: PersonalizationMethod = train(folder, tmp_path, WORDS)
    of_each = model.parameters_of_each_concept()
    assert len(of_each) == 3
    assert {id(p) for own in of_each for p in own} == {id(p) for p in model.trained_parameters()}
