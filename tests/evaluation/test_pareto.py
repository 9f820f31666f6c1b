"""Sweeps: which settings stand on which curve, what they reach by hand, and the script on tiny models."""
from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.model_files import WIDTH, ModelFiles, error_line
from helpers.tiny_clips import write_clip, write_segmenter
from PIL import Image

from evaluation import pareto
from evaluation.metrics.similarity import Similarity
from evaluation.sweeps.samples import Manner
from evaluation.sweeps.sweep import Curve, Drawn, Point, Source, balance_of, points_of, sweeps_of
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import save_concepts

PROMPTS = "[place]\na photo of a {} outside\n[style]\na sketch of a {}\n"
BIASES = (0.4, 0.8)


def concept(**outputs: dict[str, torch.Tensor]) -> Concept:
    return Concept("<toy>", "mug", torch.zeros(1, 2), torch.zeros(2), torch.zeros(2), {}, temperature=0.1, **outputs)


@pytest.fixture
def locked() -> Source:
    return Source("toy", concept())


@pytest.fixture
def trained() -> Source:
    return Source("toy-2", concept(target_outputs_k={"layer": torch.zeros(2)}))


@pytest.fixture
def tuned() -> Source:
    return Source("inversion", FinetunedConcept("textual-inversion", "<toy>", "mug", torch.zeros(1, 2)))


def test_one_file_with_one_lock_is_one_curve(locked: Source) -> None:
    (sweep,) = sweeps_of([locked], Manner(), BIASES)
    (curve,) = sweep.curves
    assert (sweep.key, curve.name) == ("lock", "local lock")
    assert [point.manner for point in curve.points] == [Manner(bias=0.4), Manner(bias=0.8)]


def test_files_and_locks_are_curves_and_other_methods_are_points(locked: Source, trained: Source,
                                                                 tuned: Source) -> None:
    (sweep,) = sweeps_of([tuned, locked, trained], Manner(), BIASES, ("global", "local"))
    assert [(curve.name, len(curve.points)) for curve in sweep.curves] == [
        ("inversion", 1), ("toy, global lock", 2), ("toy, local lock", 2), ("toy-2, trained keys", 2)]
    assert [curve.points[0].manner.global_locking for curve in sweep.curves] == [False, True, False, False]
    assert [curve.points[0].record()["lock"] for curve in sweep.curves] == [None, "global", "local", "trained"]
    assert [curve.points[0].record()["temperature"] for curve in sweep.curves] == [None, 0.1, 0.1, 0.1]


def test_temperature_and_guidance_are_swept_beside_their_usual_values(tuned: Source, locked: Source) -> None:
    sweeps = sweeps_of([tuned, locked], Manner(scale=4.0), BIASES, ("local",), [0.3, 0.1], [8.0, 2.0])
    assert {sweep.key: [curve.name for curve in sweep.curves] for sweep in sweeps[1:]} == {
        "temperature": ["temperature 0.1", "temperature 0.3"], "guidance": ["guidance 2", "guidance 4", "guidance 8"]}
    points = points_of(sweeps)  # what is shared is drawn once: one of another method, 2 biases at each of 4 settings
    assert len(points) == 1 + 2 * 4 and len(set(points)) == len(points)
    assert points[-1].summary == "concept toy, bias 0.8, temperature 0.1, lock local, scale 8"
    assert {point.source for point in points[1:]} == {locked}


def test_all_layers_are_swept_beside_those_in_use(locked: Source) -> None:
    some = Source("toy", replace(locked.concept, used_layers=["layer"]))
    (_, sweep) = sweeps_of([some], Manner(), BIASES)
    assert (sweep.key, [curve.name for curve in sweep.curves]) == ("layers", ["layers of its own", "all layers"])
    assert [point.manner.all_layers for curve in sweep.curves for point in curve.points] == [False, False, True, True]
    shown = [curve.points[0].summary for curve in sweep.curves]
    assert shown[0] == "concept toy, bias 0.4, temperature 0.1, lock local, scale 6"
    assert shown[1] == "concept toy, bias 0.4, temperature 0.1, lock local, layers all, scale 6"


def test_files_of_other_methods_alone_have_guidance_to_sweep(tuned: Source) -> None:
    sweeps = sweeps_of([tuned], Manner(), BIASES, ("global",), scales=[2.0])
    assert [point.manner for point in points_of(sweeps)] == [Manner(), Manner(scale=2.0)]


def test_intervals_come_from_resampling_prompts() -> None:
    """All seeds of a prompt are alike here, so that more of them must not make the interval narrower."""
    few = Drawn([Similarity(value, 0.0) for value in (10, 30)], [None] * 2)
    many = Drawn([Similarity(value, 0.0) for value in (10, 30) for _ in range(50)], [None] * 2)
    ends = [(figures["text"].mean, figures["text"].low, figures["text"].high)
            for figures in (few.figures(), many.figures())]
    assert ends[0] == ends[1] == (20, 10, 30) and "object" not in few.figures()


def test_a_curves_balance_is_that_of_bias_auto(locked: Source) -> None:
    points = tuple(Point(locked, Manner(bias=bias)) for bias in (0.4, 0.6, 0.8))
    reached = zip(points, (20, 30, 40), (90, 85, 50), strict=True)  # rescaled: 0, 1/2, 1 and 1, 7/8, 0
    drawn = {point: Drawn([Similarity(text, image)] * 2, [None]) for point, text, image in reached}
    assert balance_of(Curve("", points), drawn) is points[1]
    assert balance_of(Curve("", points[:2]), drawn) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a CLIP, a segmenter and a list of prompts."""
    folder = tmp_path_factory.mktemp("pareto")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(folder / "photos" / f"{number}.png")
    write_clip(folder / "clip")
    write_segmenter(folder / "segmenter")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def flags(files: Path, model_files: ModelFiles, outdir: Path, **changes: Any) -> list[str]:
    given = {"config": model_files.config, "photos": files / "photos", "clip": files / "clip", "segmenter": "none",
             "prompts": files / "prompts.txt", "seeds": 2, "steps": 2, "device": "cpu", "outdir": outdir, **changes}
    return [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as opened:
        return list(csv.DictReader(opened))


def test_the_script_draws_curves_and_grids_and_tells_what_they_are_made_of(
        files: Path, model_files: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pareto.main([*flags(files, model_files, tmp_path / "out", segmenter=files / "segmenter"), "--concept", str(model_files.teddy),
                 "--biases", "2", "0.4", "0.8", "--scale", "2"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "similarities.csv", "lock.csv", "lock_image.png", "lock_object.png", "lock-local-lock.png",
        "lock-global-lock.png"}
    means, every = rows(tmp_path / "out" / "lock.csv"), rows(tmp_path / "out" / "similarities.csv")
    assert [(row["curve"], row["bias"]) for row in means] == [
        (f"{lock} lock", bias) for lock in ("local", "global") for bias in ("0.4", "0.8", "2.0")]
    assert len(every) == 6 * 2 * 2 and "6 settings, 2 prompts, 2 seeds: 24 pictures" in caplog.messages
    assert {row["text"] for row in every} == {"a photo of a teddy bear outside", "a sketch of a teddy bear"}
    for row in means:
        own = [one for one in every if (one["bias"], one["lock"]) == (row["bias"], row["lock"])]
        for kind in ("text", "image", "object"):
            assert float(row[kind]) == pytest.approx(np.mean([float(one[f"{kind}_similarity"]) for one in own]))
            assert float(row[f"{kind}_low"]) <= float(row[kind]) <= float(row[f"{kind}_high"])
        assert len(own) == int(row["pictures"]) == 4
    assert [sum(row["balance"] == "True" for row in means if row["curve"] == name)
            for name in ("local lock", "global lock")] == [1, 1]
    printed = capsys.readouterr().out
    assert printed.count("| local lock") == 3 and printed.count("*") == 2


def test_trained_keys_and_other_methods_come_as_further_files(files: Path, model_files: ModelFiles, tmp_path: Path) -> None:
    (teddy,) = load_perfusion_concepts(model_files.teddy)
    keys = {name: value + 1 for name, value in teddy.target_outputs_v.items()}
    save_perfusion_concepts(tmp_path / "keys.safetensors", [replace(teddy, placeholder="<bear>", target_outputs_k=keys)])
    save_concepts(tmp_path / "toy.safetensors", [FinetunedConcept("textual-inversion", "<toy>", "teddy bear",
                                                             torch.ones(1, WIDTH), base=teddy.base)])
    pareto.main([*flags(files, model_files, tmp_path / "out", seeds=1), "--concept", str(model_files.teddy),
                 str(tmp_path / "keys.safetensors"), str(tmp_path / "toy.safetensors"), "--labels", "local", "keys",
                 "inversion", "--biases", "0.4", "--locks", "local", "--scales", "4"])
    found = rows(tmp_path / "out" / "lock.csv")
    assert [(row["curve"], row["bias"], row["lock"]) for row in found] == [
        ("local, local lock", "0.4", "local"), ("keys, trained keys", "0.4", "trained"), ("inversion", "", "")]
    assert len({row["image"] for row in found}) == 3 and {row["balance"] for row in found} == {"False"}
    guidance = rows(tmp_path / "out" / "guidance.csv")
    assert [(row["scale"], row["image"] == found[0]["image"]) for row in guidance] == [("4.0", False), ("6.0", True)]
    assert {path.suffix for path in (tmp_path / "out").glob("guidance*")} == {".csv", ".png"}
    assert not (tmp_path / "out" / "lock_object.png").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    ("", "--concept"), ("--concept {teddy} {mug}", "a teddy bear and a mug, but the photos are of one thing"),
    ("--concept {both}", "holds <teddy>, <mug>, but the photos are of one thing"),
    ("--concept {teddy} --labels a b", "--labels: 2 for 1 concept files"),
    ("--concept {teddy} --biases 0.4 0.4", "--biases 0.4 0.4: one stands there twice"),
    ("--concept {teddy} --locks none", "invalid choice"), ("--concept {teddy} --temperatures 0", "must be above 0"),
    ("--concept {toy} --temperatures 0.2", "was learned by Textual Inversion and has none"),
    ("--concept {teddy} --photos nowhere", "--photos nowhere: no such folder"),
    ("--concept {teddy} --clip nowhere", "CLIP nowhere"), ("--concept {teddy} --steps 101", "101 sampling steps"),
    ("--concept {teddy} --bias 0.4", "unrecognized arguments")])
def test_mistakes_are_one_line(arguments: str, said: str, files: Path, model_files: ModelFiles, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    names = {"teddy": model_files.teddy, "mug": model_files.mug, **{name: tmp_path / name for name in ("both", "toy")}}
    save_perfusion_concepts(names["both"], [*load_perfusion_concepts(model_files.teddy), *load_perfusion_concepts(model_files.mug)])
    save_concepts(names["toy"], [FinetunedConcept("textual-inversion", "<toy>", "mug", torch.zeros(1, WIDTH))])
    given = [word.format(**names) for word in arguments.split()]
    assert said in error_line(pareto.main, [*flags(files, model_files, tmp_path / "out"), *given], capsys)
    assert not (tmp_path / "out").exists()
