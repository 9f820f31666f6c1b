"""Concept files need no covariance: everything works although nothing may compute or load one."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.model_files import PROMPT, ROUNDING, ModelFiles, load_main, script_generator
from helpers.tiny_clips import write_clip
from PIL import Image

from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.duals import add_duals
from ldm.inference import PerfusionPipeline, auto_bias, encoding
from ldm.modules.covariance_files import cached_covariance
from ldm.modules.rank_one import invert_covariance

PROMPTS = ["a <teddy> next to a <mug>", PROMPT, "a <mug> outside", "a photo of a cat"]
QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 1}


@pytest.fixture(scope="module")
def model(shared_model_files: ModelFiles) -> Any:
    return PerfusionPipeline.from_pretrained(shared_model_files.config, device="cpu").model


@pytest.fixture(scope="module")
def new_files(shared_model_files: ModelFiles, model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The concepts of the model's files, which have no dual, with it."""
    folder = tmp_path_factory.mktemp("new")
    inverse = invert_covariance(cached_covariance(model.cond_stage_model, shared_model_files.folder / "cache"))
    files = []
    for path in (shared_model_files.teddy, shared_model_files.mug):
        concepts = add_duals(load_perfusion_concepts(path), lambda: inverse)
        files.append(save_perfusion_concepts(folder / path.name, concepts, torch.float32))
    return files


@pytest.fixture
def no_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything fail that computes, loads or inverts a covariance."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a covariance is asked for")

    for name in ("cached_covariance", "load_covariance_for", "invert_covariance"):
        monkeypatch.setattr(encoding, name, fail)


def images(model: Any, files: list[Path], **settings: Any) -> np.ndarray:
    pipeline = PerfusionPipeline(model)
    pipeline.load_concepts(*files)
    return np.stack([np.asarray(image, dtype=int) for image in pipeline(PROMPTS, **QUICK, **settings).images])


@pytest.mark.parametrize("settings", [{}, {"global_locking": True}, {"bias": (0.5, 0.9), "temperature": 0.2}],
                         ids=["local", "global", "bias"])
def test_images_are_those_by_the_covariance(
    model_files: ModelFiles, model: Any, new_files: list[Path], settings: dict[str, Any],
    request: pytest.FixtureRequest
) -> None:
    """Each prompt names other concepts, so that the batch is masked as well."""
    expected = images(model, [model_files.teddy, model_files.mug], **settings)
    request.getfixturevalue("no_covariance")
    assert np.abs(images(model, new_files, **settings) - expected).max() <= ROUNDING
    with pytest.raises(AssertionError, match="a covariance is asked for"):
        images(model, [model_files.teddy, *new_files[1:]])


@pytest.mark.slow
def test_an_automatic_bias_needs_none(
    model_files: ModelFiles, new_files: list[Path], no_covariance: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("BIASES", (0.5, 2.0)), ("SEEDS", range(1)), ("REFERENCE_SEEDS", range(1, 2)), ("STEPS", 2)):
        monkeypatch.setattr(auto_bias, name, value)
    generate = script_generator(load_main("txt2img"), model_files.config, tmp_path)
    found = generate("--concept", *new_files, "--prompt", PROMPTS[0], "--n_samples", 1, "--bias", "auto", "--clip",
                     write_clip(tmp_path / "clip"))
    assert len(found) == 1


@pytest.mark.slow
def test_attention_maps_need_none(
    model_files: ModelFiles, new_files: list[Path], no_covariance: None, tmp_path: Path
) -> None:
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    arguments = [PROMPT, "--concept", new_files[0], "--mask", tmp_path / "mask.png", "--config", model_files.config,
                 "--outdir", tmp_path / "maps", "--device", "cpu", "--ddim_steps", 3]
    load_main("attention_maps")([str(argument) for argument in arguments])
    assert (tmp_path / "maps" / "attention_maps-0000.png").is_file()
