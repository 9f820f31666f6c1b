"""Concepts that are predicted from photos: by the pipeline on a tiny model, and with the bundled encoder."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_files import QUICK, ROOT, ModelFiles, error_line, load_main
from helpers.tiny_encoders import write_cut_outs, write_encoder
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.concepts.storage import load_concepts
from ldm.inference import PerfusionPipeline
from ldm.inference.encoding import base_model_of
from ldm.modules.attention import name_text_layers
from ldm.modules.edit import project_inputs

BUNDLED = ROOT / "models" / "mini"


@pytest.fixture(scope="module")
def shared_pipeline(shared_model_files: ModelFiles) -> PerfusionPipeline:
    return PerfusionPipeline.from_pretrained(shared_model_files.config, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_pipeline: PerfusionPipeline) -> Path:
    """An encoder of the tiny model, and photos."""
    path = tmp_path_factory.mktemp("photos")
    write_cut_outs(path / "photos")
    base = base_model_of(shared_pipeline.model).fingerprint
    write_encoder(path / "encoder", base, looks=["red", "blue"], strength=2.0, projection="gated", bias=0.6)
    return path


@pytest.fixture
def pipeline(shared_pipeline: PerfusionPipeline) -> PerfusionPipeline:
    shared_pipeline.unload_concepts()
    return shared_pipeline


def test_a_predicted_concept_is_loaded_with_the_encoders_settings(pipeline: PerfusionPipeline, folder: Path) -> None:
    concept = pipeline.load_photos(folder / "photos", "teddy_bear", "<my-teddy>", encoder=folder / "encoder")
    assert pipeline.concepts == [concept] and concept.placeholder == "<my-teddy>"
    assert (concept.super_category, concept.bias, concept.projection) == ("teddy bear", 0.6, "gated")
    assert concept.dual is not None and concept.steps == 0 and concept.base
    assert torch.equal(concept.target_input, concept.super_input)
    half = pipeline.load_photos(folder / "photos", "teddy bear", encoder=folder / "encoder", strength=1.0)
    assert half.placeholder == "<it>" and len(pipeline.concepts) == 2
    layers = name_text_layers(pipeline.model.model.diffusion_model)
    for name, plain in project_inputs(layers, concept.super_input[None], "to_v").items():
        moved = concept.target_outputs_v[name] - plain[0]
        assert float(moved.norm()) > 1e-3
        torch.testing.assert_close(moved, 2 * (half.target_outputs_v[name] - plain[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"encoder": None}, "has no encoder of photos"), ({"strength": -1.0}, "strength -1.0 must be above 0"),
    ({"placeholder": "my teddy"}, "must be a word without white space"), ({"folder": "nowhere"}, "no such folder"),
    ({"super_category": "teddy|bear"}, "separates no words")])
def test_what_cannot_be_used_is_refused(pipeline: PerfusionPipeline, folder: Path, changes: dict[str, Any],
                                        message: str) -> None:
    given = {"folder": folder / "photos", "super_category": "cat", "encoder": folder / "encoder", **changes}
    with pytest.raises(UserError, match=message):
        pipeline.load_photos(given.pop("folder"), given.pop("super_category"), **given)
    assert not pipeline.concepts


@pytest.mark.slow
def test_txt2img_generates_straight_from_photos(shared_model_files: ModelFiles, folder: Path, tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_main("txt2img")([
            "--config", str(shared_model_files.config), "--photos", str(folder / "photos"), "--init_word", "cat",
            "--encoder", str(folder / "encoder"), "--prompt", "a photo of <it>", "a {} and a dog", "--n_samples", "1",
            "--bias", "0.7", *map(str, QUICK), "--outdir", str(tmp_path)])
    (concept,) = load_concepts(tmp_path / "it-0000.safetensors")
    assert concept.super_category == "cat" and len(list((tmp_path / "samples").glob("*.png"))) == 2
    assert "<it>: looks like: " in caplog.text and "bias 0.7" in caplog.text


@pytest.mark.parametrize(("flags", "message"), [
    (["--photos", "."], "--photos requires --bias auto, to compare with them, or --init_word WORDS"),
    (["--init_word", "cat"], "--init_word requires --photos"), (["--masks", "."], "add --photos and --init_word"),
    (["--encoder_strength", "2"], "add --photos and --init_word"),
    (["--photos", ".", "--init_word", "cat", "--encoder", "nowhere"], "--encoder nowhere: no such folder"),
    (["--photos", "nowhere", "--init_word", "cat"], "--photos nowhere: no such folder"),
    (["--photos", ".", "--init_word", "a|b"], "separates no words")])
def test_flags_that_miss_others_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(load_main("txt2img"), ["--prompt", "a cat", *flags], capsys)


@pytest.mark.slow
def test_the_bundled_encoder_sees_what_photos_show(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = PerfusionPipeline.from_pretrained(BUNDLED, device="cpu")
    with caplog.at_level(logging.INFO):
        pipeline.load_photos(BUNDLED / "examples" / "mushroom", "mushroom")
    assert "<it>: looks like: blue and yellow spotted" in caplog.text
    (image,) = pipeline("a photo of a <it>", seed=1, num_inference_steps=2, sampler="dpm").images
    assert image.size == (64, 64)


def test_bundled_files_are_small_and_of_the_bundled_model() -> None:
    encoder = BUNDLED / "encoder"
    assert sum(path.stat().st_size for path in encoder.iterdir()) < 2e6
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) < 42e6
    assert OmegaConf.load(BUNDLED / "config.yaml").inference.encoder == "models/mini/encoder"
