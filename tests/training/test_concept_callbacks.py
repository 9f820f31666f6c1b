"""What is left of a run when its last pictures cannot be drawn, and the command it ends with."""
from __future__ import annotations

import logging
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from helpers.training_setup import QUICK, train_main

from ldm.common.errors import MemoryShortage, UserError
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.inference import sampling as inference
from ldm.training import concept_callbacks as concept_progress
from ldm.training.concept_callbacks import BeforeDuringAfter, drawn_with


def test_a_concept_is_safe_before_its_last_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def interrupted(self: BeforeDuringAfter, *_: object) -> None:
        drawn.append(list(tmp_path.glob("*/concept.safetensors")))
        raise KeyboardInterrupt

    monkeypatch.setattr(BeforeDuringAfter, "on_train_start", lambda *_: None)
    monkeypatch.setattr(BeforeDuringAfter, "_pictures", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_main(tmp_path, *QUICK, "--max_steps", 2, "lightning.callbacks.previews.params.during=0")
    (path,) = drawn[0]
    assert load_perfusion_concepts(path)[0].steps == 2


def test_pictures_that_do_not_fit_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def too_large(*_: object) -> None:
        raise MemoryShortage("cuda has no memory for 1 such pictures at a time; draw smaller ones")

    monkeypatch.setattr(BeforeDuringAfter, "_pictures", too_large)
    logdir = train_main(tmp_path, *QUICK, "--max_steps", 2)
    assert load_perfusion_concepts(logdir / "concept.safetensors")[0].steps == 2
    assert [message for message in caplog.messages if message.startswith("no pictures of my-teddy (after)")]


@pytest.mark.parametrize("fits", [True, False])
def test_the_public_configs_callback_shows_concepts_where_memory_lasts(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not fits:
        monkeypatch.setattr(concept_progress, "drawn_now", Mock(side_effect=MemoryShortage("cuda has no memory")))
    logger = "lightning.callbacks.image_logger"
    logdir = train_main(tmp_path, *QUICK, "--max_steps", 1, "lightning.callbacks.previews=null",
                   f"{logger}.target=main.ImageLogger", f"{logger}.params.batch_frequency=1",
                   f"{logger}.params.log_images_kwargs.ddim_steps=2")
    assert load_perfusion_concepts(logdir / "concept.safetensors")[0].steps == 1
    assert (logdir / "images" / "train" / "samples_gs-000001.png").is_file() == fits
    assert ("no pictures at step 1: cuda has no memory" in caplog.messages) != fits


def test_the_last_line_names_the_config_where_the_usual_one_would_not_do(tmp_path: Path,
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    covariance = tmp_path / "my own.safetensors"
    covariance.write_bytes(Path("models/mini/covariance.safetensors").read_bytes())
    logdir = train_main(tmp_path / "logs", *QUICK, "--max_steps", 1, f"model.params.covariance={covariance}")
    (line,) = (message for message in caplog.messages if message.startswith("next: "))
    words = shlex.split(line)
    config = words[words.index("--config") + 1]
    assert words[words.index("--scale") + 1] == "2"
    assert Path(config).parent == logdir / "configs" and words[-1] == "a photo of a <my-teddy> on the beach"
    assert inference.read_model_config(config).model.params.covariance == str(covariance)


def test_a_run_from_another_folder_has_no_usual_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SimpleNamespace(default_root_dir=str(tmp_path))
    assert drawn_with(trainer) == ""
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "2026-project.yaml"
    config.write_bytes(Path("configs/perfusion.yaml").read_bytes())
    assert drawn_with(trainer) == ""
    monkeypatch.chdir(tmp_path)
    assert drawn_with(trainer) == f"--config {config} "


def test_an_unknown_sampler_is_told_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match="sampler 'ddjm' is unknown"):
        BeforeDuringAfter(["a {}"], sampler="ddjm")
