"""The command lines of latent-diffusion, Textual Inversion and DreamBooth, and what their configs look like."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.training.config import read_config

PHOTOS = "ldm.data.personalized.PersonalizedBase"
README = ("-t", "--actual_resume", "model.ckpt", "-n", "run", "--gpus", "0,", "--data_root", "photos", "--init_word",
          "toy", "--no-test")


def photos(**params: Any) -> dict[str, Any]:
    return {"target": PHOTOS, "params": {"size": 64, "per_image_tokens": False, **params}}


@pytest.fixture
def inversion(tmp_path: Path) -> Path:
    """A config with the keys that Textual Inversion's has, and no others."""
    manager = {"target": "ldm.modules.embedding_manager.EmbeddingManager",
               "params": {"placeholder_strings": ["*"], "initializer_words": ["sculpture"], "per_image_tokens": False}}
    model = {"base_learning_rate": 0.005, "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
             "params": {"timesteps": 10, "personalization_config": manager}}
    data = {"batch_size": 2, "num_workers": 2, "wrap": False, "train": photos(set="train", repeats=100),
            "validation": photos(set="val", repeats=10)}
    lightning = {"modelcheckpoint": {"params": {"every_n_train_steps": 500}}, "trainer": {"max_steps": 6100}}
    return save(tmp_path / "finetune.yaml", model, data, lightning)


@pytest.fixture
def dreambooth(tmp_path: Path) -> Path:
    model = {"base_learning_rate": 1e-6, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {}}
    data = {"batch_size": 1, "train": photos(set="train"), "reg": photos(set="train", reg=True),
            "validation": photos(set="val")}
    return save(tmp_path / "unfrozen.yaml", model, data, {"trainer": {"max_steps": 800}})


def save(path: Path, model: dict[str, Any], data: dict[str, Any], lightning: dict[str, Any]) -> Path:
    section = {"target": "main.DataModuleFromConfig", "params": data}
    OmegaConf.save(OmegaConf.create({"model": model, "data": section, "lightning": lightning}), path)
    return path


def read(config: Path, *arguments: str) -> DictConfig:
    return read_config(parse_training_options(["--base", str(config), *arguments]))


def test_the_command_of_textual_inversion(inversion: Path) -> None:
    config = read(inversion, *README, "--placeholder_string", "%", "--embedding_manager_ckpt", "start.pt")
    manager, data = config.model.params.personalization_config.params, config.data.params
    assert config.model.params.ckpt_path == "model.ckpt"
    assert manager.initializer_words == ["toy"] and manager.placeholder_strings == ["%"]
    assert manager.embedding_manager_ckpt == "start.pt"
    for section in (data.train, data.validation):
        assert section.params.data_root == "photos" and section.params.placeholder_token == "%"
    assert config.lightning.modelcheckpoint == {"every_n_train_steps": 500}


def test_words_of_a_config_stay(inversion: Path) -> None:
    config = read(inversion, "--data_root", "photos")
    assert config.model.params.personalization_config.params.initializer_words == ["sculpture"]
    assert "placeholder_token" not in config.data.params.train.params


def test_the_command_of_dreambooth(dreambooth: Path) -> None:
    config = read(dreambooth, "--data_root", "photos", "--reg_data_root", "dogs", "--class_word", "dog")
    data = config.data.params
    assert (data.train.params.data_root, data.reg.params.data_root) == ("photos", "dogs")
    assert {data[name].params.placeholder_token for name in ("train", "reg", "validation")} == {"dog"}


@pytest.mark.parametrize(("available", "expected"), [(True, ("gpu", "0,")), (False, ("auto", 1))])
@pytest.mark.parametrize("arguments", [("--gpus", "0,"), ("lightning.trainer.gpus=0,",)])
def test_gpus(inversion: Path, available: bool, expected: tuple[str, Any], arguments: tuple[str, ...],
              monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with caplog.at_level(logging.WARNING):
        trainer = read(inversion, "--data_root", "photos", *arguments).lightning.trainer
    assert (trainer.accelerator, trainer.devices) == expected and "gpus" not in trainer
    assert ("no CUDA device" in caplog.text) == (not available)


def test_flags_that_are_ignored(inversion: Path) -> None:
    plain = read(inversion, "--data_root", "photos")
    assert read(inversion, "--data_root", "photos", "--no-test", "true", "-p", "mine", "--datadir_in_name") == plain


@pytest.mark.parametrize("arguments", [("--reg_data_root", "dogs"), ("--class_word", "dog")])
def test_dreambooth_needs_its_config(inversion: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"{arguments[0]}: this config has no data.params.reg"):
        read(inversion, "--data_root", "photos", *arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--init_word", "toy"), "--init_word: this config has no"),
    (("--embedding_manager_ckpt", "a.pt"), "no personalization_config")])
def test_textual_inversion_needs_its_config(dreambooth: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(dreambooth, "--data_root", "photos", *arguments)
