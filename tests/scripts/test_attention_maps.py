"""Attention maps as a user makes them, on a tiny model."""
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

from evaluation.attention.cases import cases_of, look
from evaluation.attention.masked_attention import COLUMNS, STEP_GROUPS
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.inference import sampling as inference
from ldm.modules.segmentation import ZeroShotSegmenter


class LeftHalf:
    """Stands in for a segmenter: finds everything on the left, but nothing where it was told to fail."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.asked: list[str] = []
        self.fails = fails

    def segment(self, images: Sequence[Image.Image], text: str, size: tuple[int, int]) -> torch.Tensor:
        (picture,) = images
        assert picture.size == size[::-1]
        self.asked.append(text)
        found = torch.zeros(1, *size)
        found[:, :, :size[1] // 2] = 0.2 if len(self.asked) in self.fails else 0.9
        return found


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("attention_maps")


@pytest.fixture
def word(model_files: ModelFiles, tmp_path: Path) -> Path:
    """A word of two vectors, by Textual Inversion."""
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    base = load_concepts(model_files.teddy)[0].base
    return save_concepts(tmp_path / "word.safetensors", [
        FinetunedConcept("textual-inversion", "<teddy>", "teddy bear", vectors, base=base)])


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_methods_side_by_side_as_a_picture_and_as_figures(model_files: ModelFiles, word: Path, mask: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_script("attention_maps", PROMPT, "--concepts", model_files.teddy, word, "--reference", "--mask", mask,
                     "--n_samples", 2, "--batch_size", 1, "--config", model_files.config, "--outdir", out, *QUICK,
                     cache=model_files.folder / "cache")
    assert result.returncode == 0, result.stderr
    names = ["attention_maps-0000.png", "attention_maps-0000.csv", "attention_maps-0000.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert ", ".join(str(out / name) for name in names) in result.stdout
    with (out / names[1]).open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    labels = ["base model, “teddy bear”", "Perfusion, local lock", "Textual Inversion"]
    assert list(dict.fromkeys(row["label"] for row in rows)) == labels and tuple(rows[0]) == COLUMNS
    overall = {row["label"]: row for row in rows if row["layer"] == row["steps"] == "all"}
    assert all(float(row["area"]) == 25 and row["pictures"] == "2" for row in overall.values())
    assert len({row["share"] for row in overall.values()}) == 3
    noted = json.loads((out / names[2]).read_text(encoding="utf-8"))
    assert noted["mask"] == str(mask) and len(noted["rows"]) == len(rows)
    assert [case["prompt"] for case in noted["cases"]] == [PROMPT.replace("<teddy>", "teddy bear"), PROMPT, PROMPT]
    for case in noted["cases"]:
        mean = np.mean([picture["share"] for picture in case["pictures"]])
        assert float(overall[case["label"]]["share"]) == pytest.approx(mean)
        assert f"{case['label']}: {case['word']} gets" in result.stdout


def test_the_segmenter_is_asked_of_each_picture_and_those_without_the_thing_do_not_count(
    main: Main, model_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in = LeftHalf(fails=[2])
    monkeypatch.setattr(ZeroShotSegmenter, "from_path", lambda *_: stand_in)
    main([PROMPT, "--concepts", str(model_files.teddy), "--config", str(model_files.config), "--outdir", str(tmp_path / "out"),
          "--n_samples", "3", "--shown", "2", "--labels", "mine", *QUICK])
    assert stand_in.asked == ["teddy bear"] * 3
    assert "mine, seed 2: the segmenter finds no teddy bear in it" in caplog.text
    said = capsys.readouterr().out
    assert re.search(r"mine: <teddy> gets .*; 2 of 3 pictures\n", said)
    noted = json.loads((tmp_path / "out" / "attention_maps-0000.json").read_text(encoding="utf-8"))
    assert [sorted(picture) for picture in noted["cases"][0]["pictures"]] == [
        ["area", "attention", "seed", "share"], ["seed"], ["area", "attention", "seed", "share"]]


def test_where_nothing_is_found_nothing_is_measured_and_maps_are_shown(
    main: Main, model_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in = LeftHalf(fails=[1])
    monkeypatch.setattr(ZeroShotSegmenter, "from_path", lambda *_: stand_in)
    main(["a big cat outside", "--word", "Big cat", "--config", str(model_files.config), "--outdir", str(tmp_path / "out"),
          "--n_samples", "1", *QUICK])
    assert stand_in.asked == ["Big cat"]
    assert "base model: no Big cat was found in any picture, so nothing is measured" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "attention_maps-0000.png").width > 500


def test_the_pictures_are_those_that_are_drawn_without_maps(main: Main, model_files: ModelFiles) -> None:
    (case,) = cases_of(main.__wrapped__.__globals__["parse_arguments"](
        [PROMPT, "--concepts", str(model_files.teddy), "--config", str(model_files.config), *QUICK]))
    model = inference.load_base(case.plan.config, None, "cpu")
    seen = look(case, model)
    encoder = inference.prompt_encoder(model, case.plan.concepts)
    encoded = inference.encode_once(encoder, case.plan.prompts)
    drawn = inference.draw_pictures(model, encoded, case.plan.jobs, case.plan.sampling)
    assert all(np.array_equal(one.picture, other) for one, other in zip(seen, drawn, strict=True))
    assert all(maps.shape[0] == len(STEP_GROUPS) for one in seen for maps in one.maps.values())


MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    (("a cat",), "nothing to look at; give a concept file"),
    (("a cat", "--word", "cat", "--reference"), "--reference stands beside concepts"),
    (("a cat", "--word", "dog"), "--word dog: does not stand in the prompt 'a cat'"),
    (("a cat", "--word", "ca", "--mask", "{mask}"), "word 'ca' does not occur in the prompt"),
    (("a cat", "--word", "cat", "--ddim_steps", "2"), "--steps 2: maps are of early, middle and late steps"),
    (("a cat", "--concepts", "{model_files}/teddy.safetensors"), "names no concept of .*, which has <teddy>"),
    (("a <mug>", "--concepts", "{model_files}/teddy.safetensors"), "names <mug>, but no loaded concept"),
    (("a <teddy>", "--concepts", "{model_files}/teddy.safetensors", "--labels", "a", "b"), "--labels: 2 for 1 concept files"),
    (("a <teddy>", "--concepts", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
    (("a cat", "--word", "cat", "--mask", "nowhere.png"), "nowhere.png: no such file"),
    (("a cat", "--word", "cat", "--mask", "a.png", "--segmenter", "b"), "not allowed with argument"),
    (("a cat", "--word", "cat", "--segmenter", "no/such/folder"), "segmenter no/such/folder: no such folder"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0])[-40:] for mistake in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_written(
    main: Main, model_files: ModelFiles, mask: Path, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(model_files=model_files.folder, mask=mask) for argument in arguments]
    base = ["--config", str(model_files.config), "--outdir", str(tmp_path / "out"), *QUICK]
    error = error_line(main, [given[0], *base, *given[1:]], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
