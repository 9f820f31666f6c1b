"""The command that measures images of a concept, on tiny models: what it generates, reads, writes and prints."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluation_files import command_line, read_rows, write_evaluation_files
from helpers.model_files import PROMPT, ROOT, ModelFiles, error_line
from PIL import Image

from evaluation import clip_eval
from evaluation.metrics import scoring
from evaluation.prompts.prompt_sets import UNCATEGORIZED
from evaluation.stats.intervals import cluster_bootstrap_mean
from ldm.inference.output_folder import read_metadata

PROMPTS = """[style]
a sketch of a {} outside
[background]
a photo of a {} outside
a photo of a {} inside
"""
Rows = list[dict[str, str]]
Measure = Callable[..., Rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_files(tmp_path_factory.mktemp("evaluation"), PROMPTS)


def flags(files: Path, model_files: ModelFiles, outdir: Path, **changes: Any) -> list[str]:
    defaults = {"photos": files / "photos", "clip": files / "clip", "segmenter": files / "segmenter", "device": "cpu",
                "config": model_files.config, "outdir": outdir}
    return command_line(**{**defaults, **changes})


@pytest.fixture
def measure(files: Path, model_files: ModelFiles, tmp_path: Path) -> Measure:
    """Runs the command in this process and returns the scores of each image."""

    def run(*arguments: object, outdir: str = "out", **changes: Any) -> Rows:
        clip_eval.main([*flags(files, model_files, tmp_path / outdir, **changes), *map(str, arguments)])
        return read_rows(tmp_path / outdir / "similarities.csv")

    return run


def approximate(rows: Rows) -> list[dict[str, object]]:
    """Return rows that equal others if similarities differ by rounding only, which depends on the batch."""
    return [{name: pytest.approx(float(value), abs=1e-3) if name.endswith("similarity") and value else value
             for name, value in row.items()} for row in rows]


def concept_flags(files: Path, model_files: ModelFiles) -> tuple[object, ...]:
    return ("--concept", model_files.teddy, "--prompts", files / "prompts.txt", "--seeds", 2, "--ddim_steps", 2)


@pytest.mark.slow
def test_the_command_generates_measures_and_prints_from_any_directory(
        files: Path, model_files: ModelFiles, measure: Measure, tmp_path: Path) -> None:
    arguments = [*flags(files, model_files, tmp_path / "first"), *map(str, concept_flags(files, model_files)), "--save"]
    result = subprocess.run([sys.executable, ROOT / "evaluation" / "clip_eval.py", *arguments], capture_output=True,
                            text=True, check=False, cwd=tmp_path,
                            env={**os.environ, "PERFUSION_CACHE": str(model_files.folder / "cache")})
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0] == (
        "<teddy>, a teddy bear, bias 0.75, temperature 0.1: 3 prompts, 2 seeds")
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert [line[:2] for line in printed[2:6]] == [["style", "2"], ["background", "4"], ["all", "6"],
                                                   ["photos to each other", "3"]]
    first = read_rows(tmp_path / "first" / "similarities.csv")
    assert [row["category"] for row in first] == ["style"] * 2 + ["background"] * 4
    assert [row["seed"] for row in first] == ["1", "2"] * 3
    assert (first[2]["prompt"], first[2]["text"]) == (PROMPT, "a photo of a teddy bear outside")
    mean = sum(float(row["text_similarity"]) for row in first) / 6
    assert printed[4][2].startswith(f"{mean:.1f} (")
    (overall,) = [row for row in read_rows(tmp_path / "first" / "means.csv")
                  if (row["category"], row["metric"]) == ("all", "text")]
    assert float(overall["mean"]) == pytest.approx(mean)
    assert float(overall["low"]) <= mean <= float(overall["high"])
    assert Image.open(tmp_path / "first" / "grid-0000.png").width > 2 * 16

    again = measure("--images", tmp_path / "first" / "samples")  # with the captions in the images' metadata
    assert approximate(again) == approximate(first)


@pytest.mark.slow
def test_intervals_come_from_resampling_prompts(measure: Measure, files: Path, model_files: ModelFiles, tmp_path: Path
                                                ) -> None:
    """A category of one prompt has no interval, however many seeds there are."""
    rows = measure(*concept_flags(files, model_files), segmenter="none")
    means = {row["category"]: row for row in read_rows(tmp_path / "out" / "means.csv") if row["metric"] == "text"}
    assert means["style"]["low"] == means["style"]["high"] == "" and means["style"]["count"] == "2"
    expected = cluster_bootstrap_mean([float(row["text_similarity"]) for row in rows], [row["prompt"] for row in rows])
    assert float(means["all"]["low"]) == pytest.approx(expected.low, abs=1e-3)
    assert float(means["all"]["high"]) == pytest.approx(expected.high, abs=1e-3)


@pytest.mark.slow
def test_prompts_come_from_metadata_a_list_or_a_flag(measure: Measure, model_files: ModelFiles, files: Path,
                                                     tmp_path: Path) -> None:
    generated = measure(*concept_flags(files, model_files), "--save", outdir="generated", segmenter="none")
    assert all(row["object_similarity"] == "" for row in generated)
    list_file = tmp_path / "captions.csv"
    lines = [f"{Path(row['file']).name},{row['prompt']},{row['seed']},{row['category']}" for row in generated[::-1]]
    list_file.write_text("\n".join(["file,prompt,seed,category", *lines]) + "\n")
    images = tmp_path / "generated" / "samples"
    listed = measure("--images", images, "--captions", list_file, "--super_category", "teddy bear", segmenter="none")
    assert approximate(listed) == approximate(generated[::-1])
    same = measure("--images", images, "--prompt", "a {} outside", "--super_category", "owl", segmenter="none")
    assert {row["text"] for row in same} == {"an owl outside"}
    found, expected = ([row["image_similarity"] for row in approximate(rows)] for rows in (same, generated))
    assert found == expected


@pytest.mark.slow
def test_masks_of_the_photos_are_used(measure: Measure, files: Path) -> None:
    given = ("--images", files / "photos", "--prompt", "a cat", "--super_category", "cat")
    without, with_masks = measure(*given), measure(*given, "--masks", files / "masks")
    found, expected = ([row["image_similarity"] for row in approximate(rows)] for rows in (without, with_masks))
    assert found == expected
    assert [row["object_similarity"] for row in without] != [row["object_similarity"] for row in with_masks]


@pytest.mark.slow
def test_settings_reach_the_images(measure: Measure, model_files: ModelFiles, files: Path) -> None:
    (files / "one.txt").write_text("a {}\n")
    (row,) = measure("--concept", model_files.teddy, "--prompts", files / "one.txt", "--seeds", 1, "--ddim_steps", 2,
                     "--bias", 2, "--scale", 1.5, "--sampler", "heun", "--seed", 7, "--global_locking", "--save",
                     segmenter="none")
    metadata = read_metadata(row["file"])
    assert (row["category"], row["seed"], metadata["seed"]) == (UNCATEGORIZED, "7", 7)
    settings = [metadata[name] for name in ("guidance_scale", "sampler", "num_inference_steps", "global_locking")]
    assert settings == [1.5, "heun", 2, True]
    assert metadata["concepts"][0]["bias"] == 2


@pytest.mark.parametrize(("arguments", "message"), [
    ("", "--images FOLDER"), ("--images {photos} --concept {teddy}", "give either --images"),
    ("--images {photos} --seeds 2", "--seeds requires --concept"), ("--images {photos} --save", "--save requires"),
    ("--concept {teddy} --prompt cat", "--prompt requires --images"),
    ("--images {photos} --prompt cat --captions x", "both say"), ("--images nowhere", "--images nowhere: no such"),
    ("--images {photos} --prompt cat --photos nowhere", "--photos nowhere"),
    ("--images {photos} --prompt cat --bias 0.5", "--bias acts on learned concepts"),
    ("--images {photos} --prompt cat --segmenter none --masks {photos}", "drop one of them"),
    ("--images {photos}", "nothing says what it was generated from"),
    ("--images {photos} --prompt a_<toy>", "--super_category: nothing says what <toy> is"),
    ("--images {photos} --prompt a_{}", "--super_category: nothing says what {} is"),
    ("--images {photos} --prompt cat", "--super_category: nothing says what the photos show"),
    ("--images {photos} --prompt cat --super_category cat --clip nowhere", "CLIP nowhere: no such folder"),
    ("--images {photos} --prompt cat --super_category cat --clip ViT-B-32", "ViT-B-32/WEIGHTS; available: openai, "),
    ("--concept {teddy} {mug}", "name a file that holds one"), ("--concept {teddy} --ddim_steps 101", "101 sampling"),
    ("--concept {teddy} --prompts nowhere", "nowhere: no such file")])
def test_errors_are_one_line(arguments: str, message: str, files: Path, model_files: ModelFiles, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    paths = {"{photos}": files / "photos", "{teddy}": model_files.teddy, "{mug}": model_files.mug}
    given = [str(paths.get(word, word)).replace("_<", " <") for word in arguments.split()]
    assert message in error_line(clip_eval.main, [*flags(files, model_files, tmp_path / "out"), *given], capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_evaluation_clip_is_an_error(files: Path, model_files: ModelFiles, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                               ) -> None:
    monkeypatch.setattr(scoring, "EVALUATION_CLIP", tmp_path / "clip")
    arguments = [*flags(files, model_files, tmp_path / "out", clip=None), "--concept", str(model_files.teddy)]
    assert "there are no weights" in error_line(clip_eval.main, arguments, capsys)


def test_bundled_files_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.cli.generation.check_concept", lambda path: None)
    options = clip_eval.parse_arguments(["--concept", "teddy.safetensors", "--photos", "models/mini/examples/teddy",
                                         "--prompts", "evaluation/prompts/photos.txt"])
    assert Path(options.references.photos).is_dir() and Path(options.samples.prompts).is_file()


def test_a_note_tells_how_many_images_have_no_object(measure: Measure, files: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    calls, segment = [], scoring.ZeroShotSegmenter.segment

    def find_few(segmenter: Any, images: list[Image.Image], *rest: Any) -> Any:
        """Finds something in all photos, but only in the first of the images."""
        probabilities = segment(segmenter, images, *rest).clamp(0.2)
        calls.append(images)
        probabilities[1 if len(calls) > 1 else len(probabilities):] = 0
        return probabilities

    monkeypatch.setattr(scoring.ZeroShotSegmenter, "segment", find_few)
    rows = measure("--images", files / "photos", "--prompt", "a cat", "--super_category", "cat")
    assert [bool(row["object_similarity"]) for row in rows] == [True, False, False] and len(calls) == 2
    assert "object similarity: the segmenter finds no cat in 2 of 3 images" in capsys.readouterr().out
