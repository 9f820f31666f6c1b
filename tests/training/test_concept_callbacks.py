"""Concept files and previews of a run: what is saved when previews fail, and the command that a run ends with."""
from __future__ import annotations

import logging
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers.training_setup import QUICK, train_main
from omegaconf import OmegaConf

from ldm.cli.generation import DEFAULT_CONFIG
from ldm.common.errors import MemoryShortage, UserError
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.inference.model_config import read_model_config
from ldm.training import concept_callbacks, next_command
from ldm.training.concept_callbacks import BeforeDuringAfter
from ldm.training.next_command import config_flag
from ldm.util import instantiate_from_config


@pytest.mark.slow
def test_the_concept_is_saved_before_the_last_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def interrupt(*_: object) -> None:
        saved.append(list(tmp_path.glob("*/concept.safetensors")))
        raise KeyboardInterrupt

    monkeypatch.setattr(BeforeDuringAfter, "on_train_start", lambda *_: None)
    monkeypatch.setattr(BeforeDuringAfter, "_generate", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_main(tmp_path, *QUICK, "--max_steps", 2, "lightning.callbacks.previews.params.during=0")
    (path,) = saved[0]
    assert load_perfusion_concepts(path)[0].steps == 2


@pytest.mark.slow
def test_a_config_may_name_the_concept_saver(tmp_path: Path) -> None:
    saver = "lightning.callbacks.saver"
    logdir = train_main(tmp_path, *QUICK, "--max_steps", 1, "lightning.callbacks.previews=null",
                        f"{saver}.target=ldm.training.concept_callbacks.ConceptSaver",
                        f"{saver}.params.precision=float32")
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    assert not torch.equal(concept.target_input, concept.target_input.half().float())


@pytest.mark.slow
def test_previews_without_memory_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    error = MemoryShortage("cuda has no memory for 1 such images at a time; generate smaller ones")
    monkeypatch.setattr(concept_callbacks, "generate_previews", Mock(side_effect=error))
    logdir = train_main(tmp_path, *QUICK, "--max_steps", 2)
    assert load_perfusion_concepts(logdir / "concept.safetensors")[0].steps == 2
    assert [message for message in caplog.messages if message.startswith("no previews of my-teddy (after)")]


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False])
def test_the_image_logger_of_public_configs_shows_concepts_if_memory_lasts(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not fits:
        error = torch.OutOfMemoryError("CUDA out of memory")
        monkeypatch.setattr("ldm.models.diffusion.latent_diffusion.LatentDiffusion.sample_images",
                            Mock(side_effect=error))
    logger = "lightning.callbacks.image_logger"
    logdir = train_main(tmp_path, *QUICK, "--max_steps", 1, "lightning.callbacks.previews=null",
                        f"{logger}.target=main.ImageLogger", f"{logger}.params.batch_frequency=1",
                        f"{logger}.params.log_images_kwargs.ddim_steps=2")
    assert load_perfusion_concepts(logdir / "concept.safetensors")[0].steps == 1
    assert (logdir / "images" / "train" / "samples_gs-000001.png").is_file() == fits
    assert ("no images at step 1: CUDA out of memory" in caplog.messages) != fits


@pytest.mark.slow
def test_the_last_line_names_the_config_if_the_default_has_another_covariance(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    covariance = tmp_path / "my own.safetensors"
    covariance.write_bytes(Path("models/mini/covariance.safetensors").read_bytes())
    logdir = train_main(tmp_path / "logs", *QUICK, "--max_steps", 1, f"model.params.covariance={covariance}")
    (line,) = (message for message in caplog.messages if message.startswith("next: "))
    words = shlex.split(line)
    config = words[words.index("--config") + 1]
    assert "--scale" not in words  # the model's config knows which guidance suits it
    assert Path(config).parent == logdir / "configs" and words[-1] == "a photo of a <my-teddy> on the beach"
    assert read_model_config(config).model.params.covariance == str(covariance)


def test_the_default_base_model_needs_no_config_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_flag(tmp_path) == ""
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "2026-project.yaml"
    config.write_bytes(Path("configs/perfusion.yaml").read_bytes())
    assert config_flag(tmp_path) == ""
    monkeypatch.chdir(tmp_path)
    assert config_flag(tmp_path) == ""  # the default is found from any folder
    other = OmegaConf.load(config)
    other.model.params.ckpt_path = "other.safetensors"
    OmegaConf.save(other, config)
    assert config_flag(tmp_path) == f"--config {config} "
    assert next_command.DEFAULT_CONFIG == DEFAULT_CONFIG


def test_an_unknown_sampler_is_named_before_training() -> None:
    with pytest.raises(UserError, match="sampler 'ddjm' is unknown"):
        BeforeDuringAfter(["a {}"], sampler="ddjm")


def test_params_of_earlier_versions_still_load() -> None:
    params = {"prompts": ["a {}"], "steps": 7, "scale": 3.0}
    settings = instantiate_from_config(
        {"target": "ldm.training.concept_progress.BeforeDuringAfter", "params": params}).settings
    assert (settings.num_inference_steps, settings.guidance_scale, settings.sampler) == (7, 3.0, "dpm")
    (left_open,) = {BeforeDuringAfter(["a {}"], sampler=None).settings}
    assert left_open.guidance_scale is None and left_open.sampler is None
