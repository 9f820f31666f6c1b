"""The script that repeats the paper's comparisons, on tiny models and with concepts that nobody taught."""
from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_files import WIDTH, ModelFiles, error_line
from helpers.tiny_clips import write_clip, write_segmenter
from omegaconf import OmegaConf
from PIL import Image

from evaluation import reproduce
from evaluation.mini import fidelity as marks
from evaluation.mini import world_prompts
from evaluation.paper import measurements as grading
from evaluation.paper.claims import UNDECIDED
from evaluation.paper.measurements import Graders, Pair, Subject, Wanted, questions, seeds_of
from evaluation.paper.studies import BASE, PERFUSION, STUDY_KEYS, Method, Setting
from evaluation.paper.training_runs import Example, School, digest
from evaluation.prompts.prompt_sets import EvaluationPrompt, select_prompts
from evaluation.reproduce import Progress, parse_arguments
from evaluation.sweeps.samples import Manner
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import save_concepts
from ldm.data.mini import example_concepts, scenes
from ldm.data.mini.scenes import BACKGROUNDS_PER_PLACE

PROMPTS = "[place]\na photo of a {} in the snow\n[style]\na sketch of a {}\n"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(shared_model_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of Perfusion on the tiny model, a CLIP, a segmenter, photos, and a list of prompts."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "segmenter").mkdir()
    config = OmegaConf.load(shared_model_files.config)
    config.model.target = "ldm.personalization.perfusion.Perfusion"
    config.model.params.update({"super_category": "cat", "placeholder": "<cat>",
                                "used_layers": ["output_blocks"],
                                "segmenter": str(write_segmenter(folder / "segmenter"))})
    config.data = {"target": "main.DataModuleFromConfig", "params": {"train": {
        "target": "ldm.data.personalized.PersonalizedBase", "params": {"data_root": "photos", "mask_root": None}}}}
    OmegaConf.save(config, folder / "perfusion.yaml")
    write_clip(folder / "clip")
    (folder / "prompts.txt").write_text(PROMPTS)
    for name in ("teddy", "teapot"):
        shutil.copytree(reproduce.MINI / "examples" / name, folder / "examples" / name)
    return folder


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two concepts, one background for each place, few texts and scenes."""
    bank, few = scenes.background_bank, {name: example_concepts.CONCEPTS[name] for name in ("teddy", "teapot")}
    monkeypatch.setattr(scenes, "background_bank", lambda place, size: bank(place, size, 1) * BACKGROUNDS_PER_PLACE)
    monkeypatch.setattr(world_prompts, "PLAIN_TEMPLATES", ("a {}",))
    monkeypatch.setattr(world_prompts, "kind_texts", lambda: [["a cat"]] * 100)
    monkeypatch.setattr(world_prompts, "place_texts", lambda: [["in the snow"]] * 20)
    for module in (marks, example_concepts):
        monkeypatch.setattr(module, "CONCEPTS", few)
    embedded = marks.Marks._embedded
    monkeypatch.setattr(marks.Marks, "_embedded", lambda self, _, seed: embedded(self, 2, seed))


@pytest.fixture
def taught(model_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of runs of main.py, concept files of random numbers; the arguments of each run."""
    calls: list[list[str]] = []

    def pretend(self: School, arguments: Sequence[str]) -> float:
        calls.append(list(arguments))
        given = dict(zip(arguments, arguments[1:], strict=False))
        made = random_concept_of(model_files, " ".join(arguments), given["--placeholder_string"], given["--init_word"])
        made = replace(made, steps=int(given.get("--max_steps", 0)))
        save_concepts(Path(given["--logdir"]) / f"now_{given['--name']}" / "concept.safetensors", [made])
        return 1.5

    monkeypatch.setattr(School, "_run", pretend)
    return calls


def random_concept_of(model_files: ModelFiles, arguments: str, placeholder: str, super_category: str) -> Any:
    """What the method of these arguments might have learned."""
    (concept,) = load_perfusion_concepts(model_files.teddy)
    methods = [name for name in ("textual-inversion", "custom-diffusion", "dreambooth") if f"{name}.yaml" in arguments]
    if not methods:
        return replace(concept, placeholder=placeholder, super_category=super_category)
    vectors = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    inputs = vectors if methods == ["custom-diffusion"] else torch.zeros(0, 0)
    return FinetunedConcept(methods[0], placeholder, super_category, vectors, {}, inputs, 16, base=concept.base)


@pytest.fixture
def run(files: Path, taught: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script in this process; returns results.json."""
    monkeypatch.setattr(reproduce, "MINI", files)

    def carry_out(*arguments: object) -> dict[str, Any]:
        digest.cache_clear()
        School.key.cache_clear()
        given = {"config": files / "perfusion.yaml", "evaluation_clip": files / "clip", "outdir": tmp_path / "out",
                 "device": "cpu", "prompts": files / "prompts.txt", "concepts": 2, "seeds": 2, "steps": 1,
                 "pair_places": 1, "batch_size": 64}
        flags = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        reproduce.main([*flags, *map(str, arguments)])
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return carry_out


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for kind in ("concepts", "graded") for path in (folder / kind).rglob("*.*")}


def test_every_study_has_a_table_a_figure_and_verdicts(run: Run, taught: list[list[str]], tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    results = run("--biases", 0.6, "--seeds", 1)
    folder = tmp_path / "out"
    assert list(results["studies"]) == list(STUDY_KEYS) == list(dict.fromkeys(
        verdict["study"] for verdict in results["verdicts"]))
    assert len(taught) == 10 * 2  # those of the config's own projection are not taught once more
    summary = (folder / "summary.md").read_text()
    for key in STUDY_KEYS:
        assert Image.open(folder / f"{key}.png").format == "PNG" and f"({key}.png)" in summary
        assert (folder / f"{key}.md").read_text() in summary
    for verdict in results["verdicts"]:
        assert f"| {verdict['statement']} | {verdict['verdict']} |" in summary
    said = capsys.readouterr().out
    assert "nothing is left to make" in said and said.count("taught ") == 20 and said.count("drew ") == 2 * 15 + 2 * 5
    row = results["studies"]["baselines"][0]["figures"]
    assert row["text"]["count"] == 2 * 2 and row["own"]["count"] == row["there"]["count"] == 2
    assert set(results["ceilings"]) == {
        "concepts alone", "concepts beside another thing", "known drawings in their looks, alone",
        "known drawings in their looks, beside another thing", "others taken for a concept",
        "two concepts side by side, both"}
    assert {verdict["verdict"] for verdict in results["verdicts"] if verdict["study"] != "cost"} == {UNDECIDED}
    cost = results["studies"]["cost"][0]["figures"]["seconds"]
    assert (cost["mean"], cost["low"]) == (1.5, None) and "trainings at once" in (folder / "cost.md").read_text()


def test_it_goes_on_where_it_was(run: Run, taught: list[list[str]], tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--only", "masks", "--biases", 0.4, 1.1, "--other_biases", 0.4, 1.1)
    first = run(*few)
    before = times(tmp_path / "out")
    assert len(before) == 4 * 2 + 8 * 2  # files with what they cost, tables with sheets
    one = next((tmp_path / "out" / "graded").rglob("*.csv"))
    kept = one.read_text()
    one.unlink()
    capsys.readouterr()
    assert run(*few)["studies"] == first["studies"] and one.read_text() == kept
    assert {path for path, time in times(tmp_path / "out").items() if before.get(path) != time} == {
        one, one.with_suffix(".png")}
    said = capsys.readouterr().out
    assert said.count("drew ") == 1 and "taught" not in said and len(taught) == 4


def test_what_was_made_in_another_way_is_made_anew_and_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--only", "masks", "--biases", 0.4)
    run(*few)
    capsys.readouterr()
    run(*few, "--scale", 3)
    said = capsys.readouterr().out
    assert said.count("drawing anew") == said.count("drew ") == 4 and "teaching anew" not in said
    run(*few, "--train_steps", 3)
    assert capsys.readouterr().out.count("teaching anew") == 4


def test_sets_say_what_was_recognised(run: Run, tmp_path: Path) -> None:
    run("--only", "masks", "two_concepts", "--biases", 0.4)
    (single, *_) = sorted((tmp_path / "out" / "graded" / "perfusion" / "teddy").glob("*.csv"))
    with single.open() as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["prompt"], row["template"]) for row in rows] == [
        (prompt.format("teddy bear"), prompt) for prompt in ("a photo of a {} in the snow", "a sketch of a {}")
        for _ in range(2)]
    assert len({row["seed"] for row in rows}) == 4
    assert [bool(row["there"]) for row in rows] == [bool(row["own"]) for row in rows] == [True, True, False, False]
    looks = {"teddy bear, purple striped yellow": "teddy", "teapot, green spotted pink": "teapot"}
    for row in rows[:2]:
        very, own = row["seen"].endswith(", held out"), looks.get(row["seen"].removesuffix(", held out")) == "teddy"
        assert (float(row["own"]), float(row["itself"])) == (100 * own, 100 * (own and very))
    pair = next((tmp_path / "out" / "graded" / "base-model" / "teapot+teddy").glob("*.csv"))
    with pair.open() as opened:
        rows = list(csv.DictReader(opened))
    assert rows[0]["prompt"] == "a photo of a teapot next to a teddy bear on the beach" and len(rows) == 2
    for row in rows:
        seen = [row[side].removesuffix(", held out") for side in ("left", "right")]
        assert float(row["own"]) == 100 * (sorted(seen) == sorted(looks))
        assert float(row["one"]) == 100 * bool({*seen} & {*looks})
        assert float(row["kinds"]) == 100 * (sorted(one.partition(",")[0] for one in seen) == ["teapot", "teddy bear"])


def test_concepts_are_asked_for_by_their_words_and_the_base_model_by_what_they_are(files: Path) -> None:
    owl, cat = (Example(name, files, name) for name in ("owl", "cat"))
    wanted = Wanted([EvaluationPrompt("style", "a sketch of a {} in the woods")], ["snow"], 2, Manner())
    for method, words in ((PERFUSION, "a <my-owl>"), (BASE, "an owl")):
        (question,) = questions(Setting(method), owl, wanted)
        assert question.prompt == f"a sketch of {words} in the woods" and question.place == "forest"
        assert question.text == "a sketch of an owl in the woods"
        assert question.template == "a sketch of a {} in the woods"
    (both,) = questions(Setting(PERFUSION), Pair(cat, owl), wanted)
    assert both.prompt == "a photo of a <my-cat> next to a <my-owl> in the snow"
    assert both.text == "a photo of a cat next to an owl in the snow"


def test_another_clip_grades_anew(files: Path, tmp_path: Path) -> None:
    def key(clip: Path) -> str:
        digest.cache_clear()
        return Graders(str(files / "perfusion.yaml"), clip).key

    assert key(files / "clip") == key(files / "clip") != key(write_clip(tmp_path / "clip", seed=3))


def test_names_and_code_are_in_the_key(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(clip: str = "ViT-B-32/openai", checkpoint: str | None = None) -> str:
        digest.cache_clear()
        return Graders(str(files / "perfusion.yaml"), clip, checkpoint).key

    monkeypatch.chdir(tmp_path)
    found = [key(), key("ViT-L-14/openai")]
    for name, content in (("a.ckpt", "1"), ("b.ckpt", "1"), ("a.ckpt", "2")):
        Path(name).write_text(content)
        found.append(key(checkpoint=name))
    monkeypatch.setattr(grading, "code_of", lambda files: "other code")
    assert len({*found, key()}) == 6


def test_seeds_differ_by_concept_and_prompt_but_not_by_method(files: Path) -> None:
    wanted = Wanted([EvaluationPrompt("style", text) for text in ("a {}", "a sketch of a {}")], ["snow", "beach"], 3,
                    Manner())
    owl, cat = (Example(name, files, name) for name in ("owl", "cat"))

    def seeds(subject: Subject, method: Method = PERFUSION) -> list[list[int]]:
        return [seeds_of(subject, question, 3) for question in questions(Setting(method), subject, wanted)]

    subjects = (owl, cat, Pair(owl, cat), Pair(cat, owl))
    every = [seed for subject in subjects for some in seeds(subject) for seed in some]
    assert len(set(every)) == len(every) == 4 * 2 * 3 and all(0 <= seed < 2**32 for seed in every)
    for subject in subjects:
        assert seeds(subject) == seeds(subject, BASE)
    assert seeds_of(owl, questions(Setting(BASE), owl, wanted)[1], 9)[:3] == seeds(owl)[1]  # more go on with others


def test_what_is_all_there_is_reported_whatever_was_asked_for(run: Run, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--biases", 0.4, "--seeds", 1)
    first = run("--only", "masks", *few)
    capsys.readouterr()
    both = run("--only", "cost", *few)
    assert list(both["studies"]) == ["masks", "cost"] and both["studies"]["masks"] == first["studies"]["masks"]
    assert both["ceilings"] == first["ceilings"]
    assert "With and without the mask loss (all of it was there)" in capsys.readouterr().out
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "(masks.png)" in summary and "(cost.png)" in summary
    assert list(run("--only", "cost", *few, "--train_steps", 3)["studies"]) == ["cost"]  # masks are of other concepts


def test_prompts_are_of_all_categories_in_turn() -> None:
    prompts = [EvaluationPrompt(category, f"{number}") for number, category in enumerate("aaabbc")]
    assert [prompt.text for prompt in select_prompts(prompts, 4)] == ["0", "1", "3", "5"]
    assert select_prompts(prompts, 99) == prompts


def test_what_remains_is_told_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(trainings=3, pictures=100)
    assert progress.remaining() == "left are 3 trainings and 100 pictures"
    progress.done("taught", "trainings", 1, 120.0)
    progress.done("drew", "pictures", 50, 30.0)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "  drew: 30.0 s; about 4 min left, 2 trainings and 50 pictures")


def test_quick_asks_for_less_and_never_for_more() -> None:
    options = parse_arguments(["--quick", "--seeds", "1", "--evaluation_clip", "x"])
    assert (options.seeds, options.concepts, options.train_steps, options.biases) == (1, 2, 50, (0.1, 0.3, 0.75, 1.3))
    assert options.other_biases == [0.3, 0.75]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--config", "nowhere.yaml"], "--config nowhere.yaml"), (["--only", "beauty"], "invalid choice"),
    (["--concepts", "1"], "must be 2 or more"), (["--biases", "0.9", "0.4", "--evaluation_clip", "x"], "rising"),
    (["--biases", "0.4", "0.9", "--other_biases", "0.5", "--evaluation_clip", "x"], "--other_biases 0.5: give some of"),
    (["--prompts", "nowhere.txt", "--evaluation_clip", "x"], "nowhere.txt")])
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_line(reproduce.main, [*arguments, "--outdir", str(tmp_path)], capsys)
