"""Runs of main.py that an encoder starts, and the config for them."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.training_setup import FEW_IMAGES, ROOT, in_project_root, run_main
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.storage import load_concepts

FAST = ("--base", "configs/perfusion-fast.yaml")


def train_fast(folder: Path, *arguments: str) -> tuple[Path, Concept]:
    with in_project_root():
        run_main([*FAST, "-l", str(folder), "--accelerator", "cpu", *FEW_IMAGES, *arguments])
    (logdir,) = folder.iterdir()
    (concept,) = load_concepts(logdir / "concept.safetensors")
    return logdir, concept


@pytest.mark.slow
def test_a_run_of_no_steps_saves_what_the_encoder_predicts(tmp_path: Path) -> None:
    logdir, predicted = train_fast(tmp_path / "none", "--max_steps", "0")
    assert predicted.steps == 0 and torch.equal(predicted.target_input, predicted.super_input)
    assert (logdir / "images" / "before_during_after.png").is_file() and (logdir / "images" / "masks.png").is_file()
    _, refined = train_fast(tmp_path / "one", "--max_steps", "1", "data.params.batch_size=2")
    assert refined.steps == 1
    for name, output in predicted.target_outputs_v.items():
        change = (refined.target_outputs_v[name] - output).abs().max()
        assert 0 < float(change) < 0.03  # a step of Adam moves each number by up to its learning rate


def test_no_steps_need_an_encoder(tmp_path: Path) -> None:
    with in_project_root(), pytest.raises(UserError, match="max_steps 0 trains nothing.*or an encoder"):
        run_main([*FAST, "-l", str(tmp_path / "logs"), "--max_steps", "0", "model.params.encoder=null"])
    assert not (tmp_path / "logs").exists()


def test_a_missing_encoder_is_reported_first(tmp_path: Path) -> None:
    with in_project_root(), pytest.raises(UserError, match="encoder nowhere: no such folder"):
        run_main([*FAST, "-l", str(tmp_path / "logs"), "model.params.encoder=nowhere"])


@pytest.mark.parametrize(("name", "own"), [
    ("perfusion-fast.yaml", ("encoder", "encoder_strength", "value_lr", "used_layers")),
    ("perfusion-scenes.yaml", ("copy_paste_scenes", "scene_steps", "scene_scale", "other_layers_share"))])
def test_configs_for_the_bundled_model_differ_only_in_what_they_are_for(name: str, own: tuple[str, ...]) -> None:
    other, usual = (OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / file), resolve=True)
                    for file in (name, "perfusion.yaml"))
    assert {*own} <= {*other["model"]["params"]}
    for key in own:
        other["model"]["params"].pop(key)
        usual["model"]["params"].pop(key, None)
    assert other["model"] == usual["model"] and other["data"] == usual["data"]
