"""The script that measures pictures of a concept, on tiny models: what it draws, reads, writes, prints and refuses."""
from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.model_files import PROMPT, ROOT, ModelFiles, error_line
from helpers.tiny_clips import write_clip, write_segmenter
from PIL import Image

from evaluation import clip_eval
from evaluation.metrics import clip_measures
from evaluation.metrics.captioned_images import Caption, captions_of
from evaluation.prompts.prompt_sets import UNCATEGORIZED
from evaluation.stats.intervals import cluster_bootstrap_mean
from ldm.common.errors import UserError
from ldm.inference.output_folder import read_note

PROMPTS = """[style]
a sketch of a {} outside
[place]
a photo of a {} outside
a photo of a {} inside
"""
Rows = list[dict[str, str]]
Measure = Callable[..., Rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and their masks, a CLIP, a segmenter, and a list of prompts."""
    folder = tmp_path_factory.mktemp("evaluation")
    draw = np.random.default_rng(0)
    for kind in ("photos", "masks"):
        (folder / kind).mkdir()
        for number in range(3):
            pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    write_clip(folder / "clip")
    (folder / "segmenter").mkdir()
    write_segmenter(folder / "segmenter")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def flags(files: Path, model_files: ModelFiles, outdir: Path, **changes: Any) -> list[str]:
    given = {"photos": files / "photos", "clip": files / "clip", "segmenter": files / "segmenter", "device": "cpu",
             "config": model_files.config, "outdir": outdir, **changes}
    return [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def rows(path: Path) -> Rows:
    with path.open() as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def measure(files: Path, model_files: ModelFiles, tmp_path: Path) -> Measure:
    """Runs the script in this process; returns what it says of each picture."""

    def run(*arguments: object, outdir: str = "out", **changes: Any) -> Rows:
        clip_eval.main([*flags(files, model_files, tmp_path / outdir, **changes), *map(str, arguments)])
        return rows(tmp_path / outdir / "similarities.csv")

    return run

def rounded(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """The rows with similarities that may differ by rounding, which depends on the order in a batch, as equal."""
    return [{name: pytest.approx(float(value), abs=1e-3) if name.endswith("similarity") and value else value
             for name, value in row.items()} for row in rows]



def draws(files: Path, model_files: ModelFiles) -> tuple[object, ...]:
    return ("--concept", model_files.teddy, "--prompts", files / "prompts.txt", "--seeds", 2, "--ddim_steps", 2)


def test_as_a_process_it_draws_measures_and_says_so(files: Path, model_files: ModelFiles, measure: Measure,
                                                    tmp_path: Path) -> None:
    arguments = [*flags(files, model_files, tmp_path / "drawn"), *map(str, draws(files, model_files)), "--save"]
    result = subprocess.run([sys.executable, ROOT / "evaluation" / "clip_eval.py", *arguments], capture_output=True,
                            text=True, check=False, cwd=ROOT,
                            env={**os.environ, "PERFUSION_CACHE": str(model_files.folder / "cache")})
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0] == (
        "<teddy>, a teddy bear, bias 0.75, temperature 0.1: 3 prompts, 2 seeds")
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert [line[:2] for line in printed[2:6]] == [["style", "2"], ["place", "4"], ["all", "6"],
                                                   ["photos to each other", "3"]]
    drawn = rows(tmp_path / "drawn" / "similarities.csv")
    assert [row["category"] for row in drawn] == ["style"] * 2 + ["place"] * 4
    assert [row["seed"] for row in drawn] == ["1", "2"] * 3
    assert (drawn[2]["prompt"], drawn[2]["text"]) == (PROMPT, "a photo of a teddy bear outside")
    mean = sum(float(row["text_similarity"]) for row in drawn) / 6
    assert printed[4][2].startswith(f"{mean:.1f} (")
    (of_all,) = [row for row in rows(tmp_path / "drawn" / "means.csv") if row["category"] == "all"
                 and row["similarity"] == "text"]
    assert float(of_all["mean"]) == pytest.approx(mean) and float(of_all["low"]) <= mean <= float(of_all["high"])
    assert Image.open(tmp_path / "drawn" / "grid-0000.png").width > 2 * 16

    again = measure("--images", tmp_path / "drawn" / "samples")  # by what the pictures say of themselves
    assert rounded(again) == rounded(drawn)


def test_intervals_are_by_prompts(measure: Measure, files: Path, model_files: ModelFiles, tmp_path: Path) -> None:
    """A category of one prompt has no interval, however many seeds there are; that of all is by resampling prompts."""
    drawn = measure(*draws(files, model_files), segmenter="none")
    means = {row["category"]: row for row in rows(tmp_path / "out" / "means.csv") if row["similarity"] == "text"}
    assert means["style"]["low"] == means["style"]["high"] == "" and means["style"]["count"] == "2"
    by_prompt = cluster_bootstrap_mean([float(row["text_similarity"]) for row in drawn], [row["prompt"] for row in drawn])
    assert float(means["all"]["low"]) == pytest.approx(by_prompt.low, abs=1e-3)
    assert float(means["all"]["high"]) == pytest.approx(by_prompt.high, abs=1e-3)


def test_what_pictures_were_drawn_from_is_said_in_three_ways(measure: Measure, model_files: ModelFiles, files: Path,
                                                             tmp_path: Path) -> None:
    drawn = measure(*draws(files, model_files), "--save", outdir="drawn", segmenter="none")
    assert all(row["object_similarity"] == "" for row in drawn)
    as_list = tmp_path / "captions.csv"
    lines = [f"{Path(row['file']).name},{row['prompt']},{row['seed']},{row['category']}" for row in drawn[::-1]]
    as_list.write_text("\n".join(["file,prompt,seed,category", *lines]) + "\n")
    images = tmp_path / "drawn" / "samples"
    by_list = measure("--images", images, "--captions", as_list, "--super_category", "teddy bear", segmenter="none")
    assert rounded(by_list) == rounded(drawn[::-1])
    same = measure("--images", images, "--prompt", "a {} outside", "--super_category", "owl", segmenter="none")
    assert {row["text"] for row in same} == {"an owl outside"}
    found, expected = ([row["image_similarity"] for row in rounded(rows)] for rows in (same, drawn))
    assert found == expected


def test_masks_of_the_photos_are_used(measure: Measure, files: Path) -> None:
    given = ("--images", files / "photos", "--prompt", "a cat", "--super_category", "cat")
    one, other = measure(*given), measure(*given, "--masks", files / "masks")
    found, expected = ([row["image_similarity"] for row in rounded(rows)] for rows in (one, other))
    assert found == expected
    assert [row["object_similarity"] for row in one] != [row["object_similarity"] for row in other]


def test_settings_reach_the_pictures(measure: Measure, model_files: ModelFiles, files: Path) -> None:
    (files / "one.txt").write_text("a {}\n")
    (row,) = measure("--concept", model_files.teddy, "--prompts", files / "one.txt", "--seeds", 1, "--ddim_steps", 2,
                     "--bias", 2, "--scale", 1.5, "--sampler", "heun", "--seed", 7, "--global_locking", "--save",
                     segmenter="none")
    note = read_note(row["file"])
    assert (row["category"], row["seed"], note["seed"]) == (UNCATEGORIZED, "7", 7)
    assert (note["scale"], note["sampler"], note["steps"], note["global_locking"]) == (1.5, "heun", 2, True)
    assert note["concepts"][0]["bias"] == 2


def test_pictures_of_several_concepts_need_no_more_words() -> None:
    caption = Caption("a <toy> next to an <Cup>", {"<toy>": "owl", "<cup>": "mug"})
    assert caption.text(None) == caption.text("cat") == "an owl next to a mug"
    assert Caption("a <toy>", {"<toy>": "owl"}).text("cat") == "a cat"
    assert Caption("a <toy> and a {}").text("cat") == "a cat and a cat"
    assert Caption("a sks-2 next to a sks", {"sks": "owl", "sks-2": "mug"}).text(None) == "a mug next to an owl"


def test_pictures_that_are_not_listed_are_left_out(files: Path, tmp_path: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    as_list = tmp_path / "captions.csv"
    as_list.write_text("\ufeffprompt,file\n a dog ,1.png\n", encoding="utf-8")
    (caption,) = captions_of(files / "photos", as_list)
    assert caption == Caption("a dog", file=files / "photos" / "1.png")
    assert f"2 pictures of {files / 'photos'} are not in" in caplog.text


@pytest.mark.parametrize(("content", "said"), [
    ("file,text\n1.png,a dog\n", "its first line has to be file,prompt"), ("file,prompt\n", "a line for each picture"),
    ("file,prompt\n1.png,\n", "line 2: it lacks a prompt"), ("file,prompt\n,a dog\n", "line 2: it lacks a file"),
    ("file,prompt\n1.png,a dog\n9.png,a dog\n", "line 3: there is no"), (None, "not readable as CSV")])
def test_lists_that_cannot_be_used(content: str | None, said: str, files: Path, tmp_path: Path) -> None:
    as_list = tmp_path / "captions.csv"
    if content is not None:
        as_list.write_text(content)
    with pytest.raises(UserError, match=said):
        captions_of(files / "photos", as_list)


@pytest.mark.parametrize(("arguments", "said"), [
    ("", "--images FOLDER"), ("--images {photos} --concept {teddy}", "give either --images"),
    ("--images {photos} --seeds 2", "--seeds goes with --concept"), ("--images {photos} --save", "--save goes with"),
    ("--concept {teddy} --prompt cat", "--prompt goes with --images"),
    ("--images {photos} --prompt cat --captions x", "both say"), ("--images nowhere", "--images nowhere: no such"),
    ("--images {photos} --prompt cat --photos nowhere", "--photos nowhere"),
    ("--images {photos} --prompt cat --bias 0.5", "--bias acts on learned concepts"),
    ("--images {photos} --prompt cat --segmenter none --masks {photos}", "drop one of them"),
    ("--images {photos}", "nothing says what it was drawn from"),
    ("--images {photos} --prompt a_<toy>", "--super_category: nothing says what <toy> is"),
    ("--images {photos} --prompt a_{}", "--super_category: nothing says what {} is"),
    ("--images {photos} --prompt cat", "--super_category: nothing says what the photos show"),
    ("--images {photos} --prompt cat --super_category cat --clip nowhere", "CLIP nowhere: no such folder"),
    ("--images {photos} --prompt cat --super_category cat --clip ViT-B-32", "ViT-B-32/WEIGHTS; there are openai, "),
    ("--concept {teddy} {mug}", "name a file that holds one"), ("--concept {teddy} --ddim_steps 101", "101 sampling"),
    ("--concept {teddy} --prompts nowhere", "nowhere: no such file")])
def test_mistakes_are_one_line(arguments: str, said: str, files: Path, model_files: ModelFiles, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    names = {"{photos}": files / "photos", "{teddy}": model_files.teddy, "{mug}": model_files.mug}
    given = [str(names.get(word, word)).replace("_<", " <") for word in arguments.split()]
    assert said in error_line(clip_eval.main, [*flags(files, model_files, tmp_path / "out"), *given], capsys)
    assert not (tmp_path / "out").exists()


def test_a_clip_that_is_not_shipped_yet_is_named(files: Path, model_files: ModelFiles, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(clip_eval, "EVALUATION_CLIP", tmp_path / "clip")
    given = flags(files, model_files, tmp_path / "out", clip=None)
    assert "there are no weights" in error_line(clip_eval.main, [*given, "--concept", str(model_files.teddy)], capsys)


def test_the_last_column_says_what_it_leaves_out(measure: Measure, files: Path, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], clip_measures.ZeroShotSegmenter.segment

    def blind_later(segmenter: Any, images: list[Image.Image], *rest: Any) -> Any:
        """Finds something in all photos, and in the first of the pictures."""
        likely = real(segmenter, images, *rest).clamp(0.2)
        seen.append(images)
        likely[1 if len(seen) > 1 else len(likely):] = 0
        return likely

    monkeypatch.setattr(clip_measures.ZeroShotSegmenter, "segment", blind_later)
    found = measure("--images", files / "photos", "--prompt", "a cat", "--super_category", "cat")
    assert [bool(row["object_similarity"]) for row in found] == [True, False, False] and len(seen) == 2
    assert "the segmenter finds no cat in 2 of 3 pictures" in capsys.readouterr().out
