"""The script that shows attention maps, on a tiny model."""
from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import PROMPT, QUICK, WIDTH, Main, ModelFiles, error_line, load_main, run_script
from PIL import Image

from evaluation.attention.cases import load_pipeline, prepare_cases, record_case
from evaluation.attention.masked_attention import COLUMNS, STEP_GROUPS
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.modules.segmentation import ZeroShotSegmenter


class LeftHalfSegmenter:
    """Finds everything in the left half of an image.

    Args:
        failures: numbers of the calls, from 1, in which it finds nothing.

    Attributes:
        texts: what it was asked for, call by call.
    """

    def __init__(self, failures: Sequence[int] = ()) -> None:
        self.texts: list[str] = []
        self.failures = failures

    def segment(self, images: Sequence[Image.Image], text: str, size: tuple[int, int]) -> torch.Tensor:
        (image,) = images
        assert image.size == size[::-1]
        self.texts.append(text)
        probabilities = torch.zeros(1, *size)
        probabilities[:, :, :size[1] // 2] = 0.2 if len(self.texts) in self.failures else 0.9
        return probabilities


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("attention_maps")


@pytest.fixture
def inversion(model_files: ModelFiles, tmp_path: Path) -> Path:
    """A concept file of Textual Inversion with two vectors."""
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    base = load_concepts(model_files.teddy)[0].base
    concept = FinetunedConcept("textual-inversion", "<teddy>", "teddy bear", vectors, base=base)
    return save_concepts(tmp_path / "inversion.safetensors", [concept])


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """A mask that is white in its left quarter."""
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.slow
def test_methods_are_compared_in_a_figure_and_in_numbers(model_files: ModelFiles, inversion: Path, mask: Path,
                                                         tmp_path: Path) -> None:
    outdir = tmp_path / "out"
    result = run_script("attention_maps", PROMPT, "--concepts", model_files.teddy, inversion, "--reference", "--mask",
                        mask, "--n_samples", 2, "--batch_size", 1, "--config", model_files.config, "--outdir", outdir,
                        *QUICK, cache=model_files.folder / "cache")
    assert result.returncode == 0, result.stderr
    names = ["attention_maps-0000.png", "attention_maps-0000.csv", "attention_maps-0000.json"]
    assert sorted(path.name for path in outdir.iterdir()) == sorted(names)
    assert ", ".join(str(outdir / name) for name in names) in result.stdout
    with (outdir / names[1]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = ["base model, “teddy bear”", "Perfusion, local lock", "Textual Inversion"]
    assert list(dict.fromkeys(row["label"] for row in rows)) == labels and tuple(rows[0]) == COLUMNS
    overall = {row["label"]: row for row in rows if row["layer"] == row["steps"] == "all"}
    assert all(float(row["area"]) == 25 and row["images"] == "2" for row in overall.values())
    assert len({row["share"] for row in overall.values()}) == 3
    summary = json.loads((outdir / names[2]).read_text(encoding="utf-8"))
    assert summary["mask"] == str(mask) and len(summary["rows"]) == len(rows)
    assert [case["prompt"] for case in summary["cases"]] == [PROMPT.replace("<teddy>", "teddy bear"), PROMPT, PROMPT]
    for case in summary["cases"]:
        mean = np.mean([image["share"] for image in case["images"]])
        assert float(overall[case["label"]]["share"]) == pytest.approx(mean)
        assert f"{case['label']}: {case['word']} gets" in result.stdout


@pytest.mark.slow
def test_images_in_which_the_segmenter_finds_nothing_do_not_count(
    main: Main, model_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:
    segmenter = LeftHalfSegmenter(failures=[2])
    monkeypatch.setattr(ZeroShotSegmenter, "from_path", lambda *_: segmenter)
    main([PROMPT, "--concepts", str(model_files.teddy), "--config", str(model_files.config), "--outdir",
          str(tmp_path / "out"), "--n_samples", "3", "--shown", "2", "--labels", "mine", *QUICK])
    assert segmenter.texts == ["teddy bear"] * 3
    assert "mine, seed 2: the segmenter finds no teddy bear in it" in caplog.text
    assert re.search(r"mine: <teddy> gets .*; 2 of 3 images\n", capsys.readouterr().out)
    summary = json.loads((tmp_path / "out" / "attention_maps-0000.json").read_text(encoding="utf-8"))
    assert [sorted(image) for image in summary["cases"][0]["images"]] == [
        ["area", "attention", "seed", "share"], ["seed"], ["area", "attention", "seed", "share"]]


@pytest.mark.slow
def test_maps_are_shown_even_if_nothing_can_be_measured(
    main: Main, model_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    segmenter = LeftHalfSegmenter(failures=[1])
    monkeypatch.setattr(ZeroShotSegmenter, "from_path", lambda *_: segmenter)
    main(["a big cat outside", "--word", "Big cat", "--config", str(model_files.config), "--outdir",
          str(tmp_path / "out"), "--n_samples", "1", *QUICK])
    assert segmenter.texts == ["Big cat"]
    assert "base model: no Big cat was found in any image, so nothing is measured" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "attention_maps-0000.png").width > 500


@pytest.mark.slow
def test_recording_does_not_change_the_images(main: Main, model_files: ModelFiles) -> None:
    options = main.__wrapped__.__globals__["parse_arguments"](
        [PROMPT, "--concepts", str(model_files.teddy), "--config", str(model_files.config), *QUICK])
    (case,) = prepare_cases(options)
    pipeline = load_pipeline(case)
    rows = record_case(case, pipeline)
    images = pipeline.generate(case.run.requests, case.run.settings)
    assert all(np.array_equal(row.image, image) for row, image in zip(rows, images, strict=True))
    assert all(maps.shape[0] == len(STEP_GROUPS) for row in rows for maps in row.maps.values())


ERRORS: Sequence[tuple[tuple[str, ...], str]] = (
    (("a cat",), "nothing to look at; give a concept file"),
    (("a cat", "--word", "cat", "--reference"), "--reference is shown beside concepts"),
    (("a cat", "--word", "dog"), "--word dog: does not occur in the prompt 'a cat'"),
    (("a cat", "--word", "ca", "--mask", "{mask}"), "word 'ca' does not occur in the prompt"),
    (("a cat", "--word", "cat", "--ddim_steps", "2"), "--steps 2: maps are grouped by early, middle and late steps"),
    (("a cat", "--concepts", "{teddy}"), "names no concept of .*, which has <teddy>"),
    (("a <mug>", "--concepts", "{teddy}"), "names <mug>, but no loaded concept"),
    (("a <teddy>", "--concepts", "{teddy}", "--labels", "a", "b"), "--labels: 2 for 1 concept files"),
    (("a <teddy>", "--concepts", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
    (("a cat", "--word", "cat", "--mask", "nowhere.png"), "nowhere.png: no such file"),
    (("a cat", "--word", "cat", "--mask", "a.png", "--segmenter", "b"), "not allowed with argument"),
    (("a cat", "--word", "cat", "--segmenter", "no/such/folder"), "segmenter no/such/folder: no such folder"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(error[0])[-40:] for error in ERRORS])
def test_errors_are_one_line_and_nothing_is_written(
    main: Main, model_files: ModelFiles, mask: Path, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(teddy=model_files.teddy, mask=mask) for argument in arguments]
    base = ["--config", str(model_files.config), "--outdir", str(tmp_path / "out"), *QUICK]
    error = error_line(main, [given[0], *base, *given[1:]], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
