"""evaluation/base_model.py on tiny models: its rows, its files, and what it refuses."""
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models
from helpers.model_files import error_line
from helpers.tiny_clips import write_clip
from omegaconf import OmegaConf
from PIL import Image

from evaluation import base_model
from evaluation.mini import model_quality, parts, world_prompts
from ldm.data.mini import scenes
from ldm.data.mini.scenes import VARIANTS_PER_BACKGROUND, SceneDataset


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags that name a tiny base model and two tiny CLIPs."""
    folder = tmp_path_factory.mktemp("base")
    config = {"model": tiny_models.latent_diffusion_config(folder)}
    OmegaConf.save(OmegaConf.create(config), folder / "base.yaml")
    clips = {name: write_clip(folder / "weights" / name, seed)
             for seed, name in enumerate(("clip", "evaluation_clip"))}
    return {"--config": folder / "base.yaml", "--ckpt": tiny_models.write_weights(folder), "--device": "cpu",
            **{f"--{name}": path for name, path in clips.items()}, "--weights": folder / "weights"}


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the mini world to few texts and one variant of each background."""
    variants = scenes.background_variants
    monkeypatch.setattr(scenes, "background_variants",
                        lambda background, size: variants(background, size, 1) * VARIANTS_PER_BACKGROUND)
    monkeypatch.setattr(world_prompts, "PLAIN_TEMPLATES", ("a {}",))


def measure(flags: dict[str, Any], folder: Path, *arguments: str) -> dict[str, Any]:
    given = [str(word) for pair in {**flags, "--outdir": folder}.items() for word in pair]
    base_model.main([*given, *arguments])
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_images_are_generated_recognized_and_recorded(base: dict[str, Any], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    results = measure(base, tmp_path, "--only", "one_subject", "two_subjects", "size", "--prompts", "3",
                      "--scenes", "4", "--ddim_steps", "2")
    kind, background, two, size = results["rows"]
    assert [row["goal"] for row in (kind, background, two, size)] == [90, 95, 70, 40]
    for row in (kind, background, two):
        assert row["reached"]["count"] <= 3 and 0 <= row["reached"]["mean"] <= 100
        assert set(row["ceilings"]) == {"known", "held-out"}
        assert row["ceilings"]["known"]["count"] == 4 or row is background
    assert size["met"] and size["reached"]["mean"] == pytest.approx(parts.weights_megabytes(base["--weights"]))
    records = list(csv.DictReader((tmp_path / "recognized.csv").open()))
    assert len(records) == 2 * (3 + 2 * 4)
    hits = [100.0 * (row["kinds"] == row["recognized kinds"]) for row in records[:3]]
    assert kind["reached"]["mean"] == pytest.approx(sum(hits) / 3)
    assert Image.open(tmp_path / "one_subject.png").width > 3 * 16
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 4 + 2 and printed[2].startswith("| text-to-image, one subject")
    assert results["settings"]["prompts"] == 3 and results["settings"]["machine"]["device"] == "cpu"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(base: dict[str, Any], tmp_path: Path) -> None:
    few = ("--only", "one_subject", "--prompts", "2", "--scenes", "4", "--ddim_steps", "1")
    for name in ("a", "b"):
        measure(base, tmp_path / name, *few)
    assert (tmp_path / "a" / "recognized.csv").read_text() == (tmp_path / "b" / "recognized.csv").read_text()


@pytest.mark.slow
def test_parts_are_measured_on_held_out_scenes(base: dict[str, Any], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SceneDataset] = []
    batches = parts.batches
    monkeypatch.setattr(parts, "batches", lambda data, *rest: seen.append(data) or batches(data, *rest))
    first, second = measure(base, tmp_path, "--only", "autoencoder", "clip", "--scenes", "64")["rows"]
    assert first["unit"] == "dB" and second["reached"]["count"] == 64
    for data in seen:
        assert data.seed == world_prompts.FIRST_SEED + 1
        assert all(subject.emoji_set == "twemoji" for index in range(20) for subject in data.plan(index).subjects)


@pytest.mark.slow
def test_another_autoencoder_can_be_measured(base: dict[str, Any], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "autoencoder.yaml"
    OmegaConf.save(OmegaConf.create({"model": tiny_models.first_stage_config()}), config)
    monkeypatch.setattr(model_quality, "AUTOENCODER", config)
    few = ("--only", "autoencoder", "--scenes", "4")
    own = measure(base, tmp_path, *few)
    named = measure(base, tmp_path, *few, "--autoencoder", str(base["--ckpt"]))
    assert named["rows"] == own["rows"]


def test_every_measurement_has_its_name() -> None:
    assert tuple(model_quality.MEASURES) == base_model.MEASUREMENTS


def test_old_names_of_measurements_are_accepted() -> None:
    settings = base_model.parse_arguments(["--only", "one_thing", "two_things"])
    assert settings.measurements == ("one_subject", "two_subjects")


def test_quick_lowers_the_amounts_and_never_raises_them() -> None:
    options = base_model.parse_arguments(["--quick", "--prompts", "5", "--only", "size"])
    assert (options.prompts, options.scenes, options.num_inference_steps) == (5, 128, 25)


def test_clips_may_be_given_by_name() -> None:
    options = base_model.parse_arguments(["--evaluation_clip", "ViT-B-32/openai", "--only", "one_subject"])
    assert str(options.evaluation_clip) == "ViT-B-32/openai"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--evaluation_clip", "nowhere"], "--evaluation_clip nowhere: there are no weights"),
    (["--only", "segmenter", "--segmenter", "nowhere"], "configs/mini/segmenter.yaml"),
    (["--only", "clip", "--clip", "nowhere"], "--clip nowhere: there are no weights"),
    (["--only", "clip", "--scenes", "63"], "among 64"),
    (["--only", "speed", "--prompts", "1"], "must be 2 or more"), (["--only", "beauty"], "invalid choice")])
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(base_model.main, [*arguments, "--outdir", str(tmp_path)], capsys)
