"""Sweeps: which settings are on which curve, scores computed by hand, and the command on tiny models."""
from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluation_files import command_line, read_rows, write_evaluation_files
from helpers.model_files import WIDTH, ModelFiles, error_line

from evaluation import pareto
from evaluation.sweeps.sweep import (
    Curve,
    Point,
    PointResult,
    Source,
    balanced_point,
    build_sweeps,
    distinct_points,
)
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import save_concepts
from ldm.inference.settings import GenerationSettings

PROMPTS = "[background]\na photo of a {} outside\n[style]\na sketch of a {}\n"
BIASES = (0.4, 0.8)
SETTINGS = GenerationSettings(guidance_scale=6.0)


def concept(**outputs: dict[str, torch.Tensor]) -> Concept:
    return Concept("<toy>", "mug", torch.zeros(1, 2), torch.zeros(2), torch.zeros(2), {}, temperature=0.1, **outputs)


def scores(text: float, image: float = 0.0) -> dict[str, float | None]:
    return {"text": text, "image": image, "object": None}


@pytest.fixture
def locked() -> Source:
    return Source("toy", concept())


@pytest.fixture
def trained() -> Source:
    return Source("toy-2", concept(target_outputs_k={"layer": torch.zeros(2)}))


@pytest.fixture
def inversion() -> Source:
    return Source("inversion", FinetunedConcept("textual-inversion", "<toy>", "mug", torch.zeros(1, 2)))


def test_one_file_with_one_lock_is_one_curve(locked: Source) -> None:
    (sweep,) = build_sweeps([locked], SETTINGS, BIASES)
    (curve,) = sweep.curves
    assert (sweep.key, curve.name) == ("lock", "local lock")
    assert [point.settings for point in curve.points] == [replace(SETTINGS, bias=0.4), replace(SETTINGS, bias=0.8)]


def test_files_and_locks_are_curves_and_other_methods_are_points(locked: Source, trained: Source,
                                                                 inversion: Source) -> None:
    (sweep,) = build_sweeps([inversion, locked, trained], SETTINGS, BIASES, ("global", "local"))
    assert [(curve.name, len(curve.points)) for curve in sweep.curves] == [
        ("inversion", 1), ("toy, global lock", 2), ("toy, local lock", 2), ("toy-2, trained keys", 2)]
    assert [curve.points[0].settings.global_locking for curve in sweep.curves] == [False, True, False, False]
    assert [curve.points[0].record()["lock"] for curve in sweep.curves] == [None, "global", "local", "trained"]
    assert [curve.points[0].record()["temperature"] for curve in sweep.curves] == [None, 0.1, 0.1, 0.1]


def test_sweeps_of_temperature_and_guidance_include_the_default_values(inversion: Source, locked: Source) -> None:
    settings = GenerationSettings(guidance_scale=4.0)
    sweeps = build_sweeps([inversion, locked], settings, BIASES, ("local",), [0.3, 0.1], [8.0, 2.0])
    assert {sweep.key: [curve.name for curve in sweep.curves] for sweep in sweeps[1:]} == {
        "temperature": ["temperature 0.1", "temperature 0.3"], "guidance": ["guidance 2", "guidance 4", "guidance 8"]}
    points = distinct_points(sweeps)  # one of the other method, and 2 biases at each of 4 distinct settings
    assert len(points) == 1 + 2 * 4 and len(set(points)) == len(points)
    assert points[-1].summary == "concept toy, bias 0.8, temperature 0.1, lock local, guidance scale 8"
    assert {point.source for point in points[1:]} == {locked}


def test_a_concept_with_few_layers_is_compared_with_all_layers(locked: Source) -> None:
    few_layers = Source("toy", replace(locked.concept, used_layers=["layer"]))
    (_, sweep) = build_sweeps([few_layers], SETTINGS, BIASES)
    assert (sweep.key, [curve.name for curve in sweep.curves]) == ("layers", ["layers of its own", "all layers"])
    all_layers = [point.settings.all_layers for curve in sweep.curves for point in curve.points]
    assert all_layers == [False, False, True, True]
    summaries = [curve.points[0].summary for curve in sweep.curves]
    assert summaries[0] == "concept toy, bias 0.4, temperature 0.1, lock local, guidance scale 6"
    assert summaries[1] == "concept toy, bias 0.4, temperature 0.1, lock local, layers all, guidance scale 6"


def test_other_methods_alone_have_guidance_to_sweep(inversion: Source) -> None:
    sweeps = build_sweeps([inversion], SETTINGS, BIASES, ("global",), guidance_scales=[2.0])
    assert [point.settings for point in distinct_points(sweeps)] == [SETTINGS, replace(SETTINGS, guidance_scale=2.0)]


def test_intervals_come_from_resampling_prompts() -> None:
    """All seeds of a prompt are alike here, so more seeds must not narrow the interval."""
    few = PointResult([scores(value) for value in (10, 30)], [None] * 2).estimates()
    many = PointResult([scores(value) for value in (10, 30) for _ in range(50)], [None] * 2).estimates()
    intervals = [(estimates["text"].mean, estimates["text"].low, estimates["text"].high) for estimates in (few, many)]
    assert intervals[0] == intervals[1] == (20, 10, 30) and "object" not in few


def test_the_balanced_point_is_the_choice_of_bias_auto(locked: Source) -> None:
    points = tuple(Point(locked, GenerationSettings(bias=bias)) for bias in (0.4, 0.6, 0.8))
    reached = zip(points, (20, 30, 40), (90, 85, 50), strict=True)  # rescaled: 0, 1/2, 1 and 1, 7/8, 0
    results = {point: PointResult([scores(text, image)] * 2, [None]) for point, text, image in reached}
    assert balanced_point(Curve("", points), results) is points[1]
    assert balanced_point(Curve("", points[:2]), results) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_files(tmp_path_factory.mktemp("pareto"), PROMPTS, photo_count=2)


def flags(files: Path, model_files: ModelFiles, outdir: Path, **changes: Any) -> list[str]:
    defaults = {"config": model_files.config, "photos": files / "photos", "clip": files / "clip", "segmenter": "none",
                "prompts": files / "prompts.txt", "seeds": 2, "steps": 2, "device": "cpu", "outdir": outdir}
    return command_line(**{**defaults, **changes})


@pytest.mark.slow
def test_the_command_writes_tables_plots_and_grids(files: Path, model_files: ModelFiles, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str],
                                                   caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outdir = tmp_path / "out"
    pareto.main([*flags(files, model_files, outdir, segmenter=files / "segmenter"), "--concept", str(model_files.teddy),
                 "--biases", "2", "0.4", "0.8", "--scale", "2"])
    assert {path.name for path in outdir.iterdir()} == {
        "similarities.csv", "lock.csv", "lock_image.png", "lock_object.png", "lock-local-lock.png",
        "lock-global-lock.png"}
    means, images = read_rows(outdir / "lock.csv"), read_rows(outdir / "similarities.csv")
    assert [(row["curve"], row["bias"]) for row in means] == [
        (f"{lock} lock", bias) for lock in ("local", "global") for bias in ("0.4", "0.8", "2.0")]
    assert len(images) == 6 * 2 * 2 and "6 settings, 2 prompts, 2 seeds: 24 images" in caplog.messages
    assert {row["text"] for row in images} == {"a photo of a teddy bear outside", "a sketch of a teddy bear"}
    for row in means:
        own = [image for image in images if (image["bias"], image["lock"]) == (row["bias"], row["lock"])]
        for metric in ("text", "image", "object"):
            mean = np.mean([float(image[f"{metric}_similarity"]) for image in own])
            assert float(row[metric]) == pytest.approx(mean)
            assert float(row[f"{metric}_low"]) <= float(row[metric]) <= float(row[f"{metric}_high"])
        assert len(own) == int(row["images"]) == 4
    assert [sum(row["balance"] == "True" for row in means if row["curve"] == name)
            for name in ("local lock", "global lock")] == [1, 1]
    printed = capsys.readouterr().out
    assert printed.count("| local lock") == 3 and printed.count("*") == 2


@pytest.mark.slow
def test_trained_keys_and_other_methods_are_further_files(files: Path, model_files: ModelFiles, tmp_path: Path) -> None:
    (teddy,) = load_perfusion_concepts(model_files.teddy)
    keys = {name: value + 1 for name, value in teddy.target_outputs_v.items()}
    trained_keys = replace(teddy, placeholder="<bear>", target_outputs_k=keys)
    save_perfusion_concepts(tmp_path / "keys.safetensors", [trained_keys])
    toy = FinetunedConcept("textual-inversion", "<toy>", "teddy bear", torch.ones(1, WIDTH), base=teddy.base)
    save_concepts(tmp_path / "toy.safetensors", [toy])
    pareto.main([*flags(files, model_files, tmp_path / "out", seeds=1), "--concept", str(model_files.teddy),
                 str(tmp_path / "keys.safetensors"), str(tmp_path / "toy.safetensors"), "--labels", "local", "keys",
                 "inversion", "--biases", "0.4", "--locks", "local", "--scale", "6", "--scales", "4"])
    rows = read_rows(tmp_path / "out" / "lock.csv")
    assert [(row["curve"], row["bias"], row["lock"]) for row in rows] == [
        ("local, local lock", "0.4", "local"), ("keys, trained keys", "0.4", "trained"), ("inversion", "", "")]
    assert len({row["image"] for row in rows}) == 3 and {row["balance"] for row in rows} == {"False"}
    guidance = read_rows(tmp_path / "out" / "guidance.csv")
    assert [(row["guidance_scale"], row["image"] == rows[0]["image"]) for row in guidance] == [
        ("4.0", False), ("6.0", True)]
    assert {path.suffix for path in (tmp_path / "out").glob("guidance*")} == {".csv", ".png"}
    assert not (tmp_path / "out" / "lock_object.png").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ("", "--concept"), ("--concept {teddy} {mug}", "a teddy bear and a mug, but the photos are of one subject"),
    ("--concept {both}", "holds <teddy>, <mug>, but the photos are of one subject"),
    ("--concept {teddy} --labels a b", "--labels: 2 for 1 concept files"),
    ("--concept {teddy} --biases 0.4 0.4", "--biases 0.4 0.4: a value is repeated"),
    ("--concept {teddy} --locks none", "invalid choice"), ("--concept {teddy} --temperatures 0", "must be above 0"),
    ("--concept {toy} --temperatures 0.2", "was trained by Textual Inversion and has none"),
    ("--concept {teddy} --photos nowhere", "--photos nowhere: no such folder"),
    ("--concept {teddy} --clip nowhere", "CLIP nowhere"), ("--concept {teddy} --steps 101", "101 sampling steps"),
    ("--concept {teddy} --bias 0.4", "--bias: no such flag; do you mean --biases?")])
def test_errors_are_one_line(arguments: str, message: str, files: Path, model_files: ModelFiles, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    paths = {"teddy": model_files.teddy, "mug": model_files.mug, "both": tmp_path / "both", "toy": tmp_path / "toy"}
    concepts = [*load_perfusion_concepts(model_files.teddy), *load_perfusion_concepts(model_files.mug)]
    save_perfusion_concepts(paths["both"], concepts)
    save_concepts(paths["toy"], [FinetunedConcept("textual-inversion", "<toy>", "mug", torch.zeros(1, WIDTH))])
    given = [word.format(**paths) for word in arguments.split()]
    assert message in error_line(pareto.main, [*flags(files, model_files, tmp_path / "out"), *given], capsys)
    assert not (tmp_path / "out").exists()
