"""The script that repeats the paper's comparisons, on tiny models and with concepts of random numbers."""
from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_files import WIDTH, ModelFiles, error_line
from helpers.tiny_clips import write_clip, write_segmenter
from omegaconf import OmegaConf
from PIL import Image

from evaluation import reproduce
from evaluation.mini import fidelity, world_prompts
from evaluation.paper import evaluators, reproduction
from evaluation.paper.decisions import INCONCLUSIVE
from evaluation.paper.design import Method, Variant
from evaluation.paper.evaluators import Evaluators
from evaluation.paper.examples import ConceptPair, EvalTarget, ExampleConcept
from evaluation.paper.file_keys import content_digest
from evaluation.paper.folder_lock import LOCK_NAME, lock_folder
from evaluation.paper.methods import BASE_MODEL, BASELINES, CUSTOM_DIFFUSION, PERFUSION, TEXTUAL_INVERSION
from evaluation.paper.processes import ProcessGroup
from evaluation.paper.progress import Progress
from evaluation.paper.prompt_cases import EvalPlan, build_prompt_cases, case_seeds
from evaluation.paper.studies import STUDIES
from evaluation.paper.training_runs import TrainingRuns
from evaluation.prompts.prompt_sets import EvaluationPrompt, select_prompts
from evaluation.reproduce import parse_arguments
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import save_concepts
from ldm.data.mini import example_concepts, scenes
from ldm.data.mini.scenes import VARIANTS_PER_BACKGROUND
from ldm.inference.settings import GenerationSettings

PROMPTS = "[place]\na photo of a {} in the snow\n[style]\na sketch of a {}\n"
EXAMPLES = ("teddy", "teapot")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(shared_model_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write Perfusion's config for the tiny model, a CLIP, a segmenter, photos, and a list of prompts."""
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
    for name in EXAMPLES:
        shutil.copytree(reproduction.EXAMPLES_DIR / name, folder / "examples" / name)
    return folder


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the mini world to two concepts, one variant of each background, and few texts and scenes."""
    variants, few = scenes.background_variants, {name: example_concepts.CONCEPTS[name] for name in EXAMPLES}
    monkeypatch.setattr(scenes, "background_variants",
                        lambda background, size: variants(background, size, 1) * VARIANTS_PER_BACKGROUND)
    monkeypatch.setattr(world_prompts, "PLAIN_TEMPLATES", ("a {}",))
    monkeypatch.setattr(world_prompts, "kind_texts", lambda: [["a cat"]] * 100)
    monkeypatch.setattr(world_prompts, "background_texts", lambda: [["in the snow"]] * 20)
    for module in (fidelity, example_concepts, reproduction):
        monkeypatch.setattr(module, "CONCEPTS", few)
    monkeypatch.setattr(evaluators, "SubjectFidelity", partial(fidelity.SubjectFidelity, scenes=2))


@pytest.fixture
def training_calls(model_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Write concept files of random numbers instead of running main.py; return the arguments of each run."""
    calls: list[list[str]] = []

    def pretend(self: TrainingRuns, arguments: Sequence[str], processes: ProcessGroup) -> float:
        calls.append(list(arguments))
        flags = dict(zip(arguments, arguments[1:], strict=False))
        concept = random_concept(model_files, " ".join(arguments), flags["--placeholder_string"], flags["--init_word"])
        concept = replace(concept, steps=int(flags.get("--max_steps", 0)))
        save_concepts(Path(flags["--logdir"]) / f"now_{flags['--name']}" / "concept.safetensors", [concept])
        return 1.5

    monkeypatch.setattr(TrainingRuns, "_run_main", pretend)
    return calls


def random_concept(model_files: ModelFiles, arguments: str, placeholder: str, super_category: str) -> Any:
    """Return a concept of the method that the arguments name."""
    (concept,) = load_perfusion_concepts(model_files.teddy)
    methods = [name for name in ("textual-inversion", "custom-diffusion", "dreambooth", "mine")
               if f"{name}.yaml" in arguments]
    if not methods:
        return replace(concept, placeholder=placeholder, super_category=super_category)
    vectors = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    inputs = vectors if methods == ["custom-diffusion"] else torch.zeros(0, 0)
    return FinetunedConcept(methods[0], placeholder, super_category, vectors, {}, inputs, 16, base=concept.base)


@pytest.fixture
def run(files: Path, training_calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the script in this process and returns results.json."""
    monkeypatch.setattr(reproduction, "EXAMPLES_DIR", files / "examples")

    def run_script(*arguments: object) -> dict[str, Any]:
        content_digest.cache_clear()
        TrainingRuns.key.cache_clear()
        flags = {"config": files / "perfusion.yaml", "evaluation_clip": files / "clip", "outdir": tmp_path / "out",
                 "device": "cpu", "prompts": files / "prompts.txt", "concepts": 2, "seeds": 2, "steps": 1,
                 "pair_places": 1, "batch_size": 64}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        reproduce.main([*words, *map(str, arguments)])
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run_script


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for kind in ("concepts", "evaluated")
            for path in (folder / kind).rglob("*.*")}


@pytest.mark.slow
def test_every_study_has_a_table_a_figure_and_claims(run: Run, training_calls: list[list[str]], tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    results = run("--biases", 0.6, "--seeds", 1)
    folder = tmp_path / "out"
    assert list(results["studies"]) == list(STUDIES)
    claimed = list(dict.fromkeys(claim["study"] for claim in results["claims"]))
    assert claimed == [key for key in STUDIES if not key.startswith(("encoder", "scenes"))]  # for the bundled model
    assert len(training_calls) == 11 * 2  # the config's own projection is not trained twice
    summary = (folder / "summary.md").read_text()
    for key in STUDIES:
        assert Image.open(folder / f"{key}.png").format == "PNG" and f"({key}.png)" in summary
        assert (folder / f"{key}.md").read_text() in summary
    for claim in results["claims"]:
        assert f"| {claim['claim']} | {claim['outcome']} |" in summary
    printed = capsys.readouterr().out
    assert "nothing is left to make" in printed and printed.count("  trained ") == 22
    assert printed.count("  generated ") == 2 * 16 + 2 * 6
    estimates = results["studies"]["baselines"][0]["estimates"]
    assert estimates["text"]["count"] == 2 * 2
    assert estimates["attributes"]["count"] == estimates["background_correct"]["count"] == 2
    assert set(results["ceilings"]) == {
        "concepts alone", "concepts beside another subject", "trained sprites in their appearances, alone",
        "trained sprites in their appearances, beside another subject", "others classified as a concept",
        "two concepts side by side, both", "own kind of concepts beside another subject"}
    assert {claim["outcome"] for claim in results["claims"] if claim["study"] != "cost"} == {INCONCLUSIVE}
    cost = results["studies"]["cost"][0]["estimates"]["seconds"]
    assert (cost["mean"], cost["low"]) == (1.5, None) and "trainings at once" in (folder / "cost.md").read_text()


@pytest.mark.slow
def test_an_interrupted_run_continues(run: Run, training_calls: list[list[str]], tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--only", "masks", "--biases", 0.4, 1.1, "--other_biases", 0.4, 1.1)
    first = run(*few)
    before = modification_times(tmp_path / "out")
    assert len(before) == 4 * 2 + 8 * 2  # concept files with their costs, CSV files with contact sheets
    one = next((tmp_path / "out" / "evaluated").rglob("*.csv"))
    content = one.read_text()
    one.unlink()
    capsys.readouterr()
    assert run(*few)["studies"] == first["studies"] and one.read_text() == content
    assert {path for path, time in modification_times(tmp_path / "out").items() if before.get(path) != time} == {
        one, one.with_suffix(".png")}
    printed = capsys.readouterr().out
    assert printed.count("generated ") == 1 and "trained" not in printed and len(training_calls) == 4


@pytest.mark.slow
def test_results_of_other_settings_are_made_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--only", "masks", "--biases", 0.4)
    run(*few)
    capsys.readouterr()
    run(*few, "--scale", 3)
    printed = capsys.readouterr().out
    assert printed.count("generating again") == printed.count("generated ") == 4 and "training again" not in printed
    run(*few, "--train_steps", 3)
    assert capsys.readouterr().out.count("training again") == 4


@pytest.mark.slow
def test_results_of_earlier_versions_are_ignored(run: Run, tmp_path: Path) -> None:
    """Their file names have other keys, their records other columns."""
    out = tmp_path / "out"
    for folder in ("concepts/perfusion", "graded/perfusion/teddy", "evaluated/perfusion/teddy"):
        (out / folder).mkdir(parents=True)
    (out / "concepts/perfusion/teddy-0123456789.safetensors").write_bytes(b"old")
    (out / "concepts/perfusion/teddy-0123456789.json").write_text('{"where": "here"}')
    (out / "graded/perfusion/teddy/bias-0.4-0123456789.csv").write_text("prompt,own,itself\na,100.0,\n")
    (out / "evaluated/perfusion/teddy/bias-0.4-0123456789.csv").write_text("prompt,own\na,100.0\n")
    (out / "results.json").write_text('{"verdicts": []}')
    assert run("--only", "masks", "--biases", 0.4)["claims"]


@pytest.mark.slow
def test_csv_files_tell_what_was_recognized(run: Run, tmp_path: Path) -> None:
    run("--only", "masks", "two_concepts", "--biases", 0.4)
    (single, *_) = sorted((tmp_path / "out" / "evaluated" / "perfusion" / "teddy").glob("*.csv"))
    with single.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["template"]) for row in rows] == [
        (prompt.format("teddy bear"), prompt) for prompt in ("a photo of a {} in the snow", "a sketch of a {}")
        for _ in range(2)]
    assert len({row["seed"] for row in rows}) == 4
    assert [bool(row["background_correct"]) for row in rows] == [True, True, False, False]
    assert [bool(row["attributes"]) for row in rows] == [True, True, False, False]
    looks = {"teddy bear, purple striped yellow": "teddy", "teapot, green spotted pink": "teapot"}
    for row in rows[:2]:
        is_exact = row["recognized"].endswith(", held out")
        has_attributes = looks.get(row["recognized"].removesuffix(", held out")) == "teddy"
        assert float(row["attributes"]) == 100 * has_attributes
        assert float(row["exact_match"]) == 100 * (has_attributes and is_exact)
    pair = next((tmp_path / "out" / "evaluated" / "base-model" / "teapot+teddy").glob("*.csv"))
    with pair.open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["prompt"] == "a photo of a teapot next to a teddy bear on the beach" and len(rows) == 2
    for row in rows:
        recognized = [row[side].removesuffix(", held out") for side in ("left", "right")]
        kinds = sorted(one.partition(",")[0] for one in recognized)
        assert float(row["attributes"]) == 100 * (sorted(recognized) == sorted(looks))
        assert float(row["any_attributes"]) == 100 * bool({*recognized} & {*looks})
        assert float(row["super_categories"]) == 100 * (kinds == ["teapot", "teddy bear"])


def test_prompts_name_concepts_by_placeholders_and_the_base_model_by_super_categories(files: Path) -> None:
    owl, cat = (ExampleConcept(name, files, name) for name in ("owl", "cat"))
    plan = EvalPlan([EvaluationPrompt("style", "a sketch of a {} in the woods")], ["snow"], 2, GenerationSettings())
    for method, words in ((PERFUSION, "a <my-owl>"), (BASE_MODEL, "an owl")):
        (case,) = build_prompt_cases(Variant(method), owl, plan)
        assert case.prompt == f"a sketch of {words} in the woods" and case.background == "forest"
        assert case.text == "a sketch of an owl in the woods"
        assert case.template == "a sketch of a {} in the woods"
    (both,) = build_prompt_cases(Variant(PERFUSION), ConceptPair(cat, owl), plan)
    assert both.prompt == "a photo of a <my-cat> next to a <my-owl> in the snow"
    assert both.text == "a photo of a cat next to an owl in the snow"


def test_another_clip_gives_another_key(files: Path, tmp_path: Path) -> None:
    def key(clip: Path) -> str:
        content_digest.cache_clear()
        return Evaluators(str(files / "perfusion.yaml"), clip).key

    assert key(files / "clip") == key(files / "clip") != key(write_clip(tmp_path / "clip", seed=3))


def test_keys_cover_names_weights_and_code(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(clip: str = "ViT-B-32/openai", checkpoint: str | None = None) -> str:
        content_digest.cache_clear()
        return Evaluators(str(files / "perfusion.yaml"), clip, checkpoint).key

    monkeypatch.chdir(tmp_path)
    keys = [key(), key("ViT-L-14/openai")]
    for name, content in (("a.ckpt", "1"), ("b.ckpt", "1"), ("a.ckpt", "2")):
        Path(name).write_text(content)
        keys.append(key(checkpoint=name))
    monkeypatch.setattr(evaluators, "code_digest", lambda entries: "other code")
    assert len({*keys, key()}) == 6


def test_seeds_differ_by_concept_and_prompt_but_not_by_method(files: Path) -> None:
    plan = EvalPlan([EvaluationPrompt("style", text) for text in ("a {}", "a sketch of a {}")], ["snow", "beach"], 3,
                    GenerationSettings())
    owl, cat = (ExampleConcept(name, files, name) for name in ("owl", "cat"))

    def seeds(target: EvalTarget, method: Method = PERFUSION) -> list[list[int]]:
        return [case_seeds(target, case, 3) for case in build_prompt_cases(Variant(method), target, plan)]

    targets = (owl, cat, ConceptPair(owl, cat), ConceptPair(cat, owl))
    all_seeds = [seed for target in targets for of_case in seeds(target) for seed in of_case]
    assert len(set(all_seeds)) == len(all_seeds) == 4 * 2 * 3 and all(0 <= seed < 2**32 for seed in all_seeds)
    for target in targets:
        assert seeds(target) == seeds(target, BASE_MODEL)
    case = build_prompt_cases(Variant(BASE_MODEL), owl, plan)[1]
    assert case_seeds(owl, case, 9)[:3] == seeds(owl)[1]  # a larger number adds seeds


@pytest.mark.slow
def test_complete_studies_are_reported_even_if_not_selected(run: Run, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--biases", 0.4, "--seeds", 1)
    first = run("--only", "masks", *few)
    capsys.readouterr()
    both = run("--only", "cost", *few)
    assert list(both["studies"]) == ["masks", "cost"] and both["studies"]["masks"] == first["studies"]["masks"]
    assert both["ceilings"] == first["ceilings"]
    assert "With and without the mask loss (from an earlier run)" in capsys.readouterr().out
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "(masks.png)" in summary and "(cost.png)" in summary
    assert list(run("--only", "cost", *few, "--train_steps", 3)["studies"]) == ["cost"]  # masks has other concepts


@pytest.mark.slow
def test_methods_selects_baselines_and_takes_config_files(run: Run, training_calls: list[list[str]], tmp_path: Path
                                                          ) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {target: ldm.personalization.textual_inversion.TextualInversion, params: {}}\n")
    results = run("--only", "cost", "--methods", "textual-inversion", mine)
    assert [row["name"] for row in results["studies"]["cost"]] == ["Perfusion", "Textual Inversion", "mine"]
    assert sum(str(mine) in " ".join(call) for call in training_calls) == 2 and len(training_calls) == 3 * 2
    # No file holds weights, so nothing is claimed about those.
    assert [claim["claim"] for claim in results["claims"]] == ["a concept is a file of less than 100 KB"]


def test_methods_are_read_from_the_command_line() -> None:
    def selected(*names: str) -> tuple[Method, ...]:
        return parse_arguments(["--methods", *names]).baselines

    assert parse_arguments([]).baselines == BASELINES
    assert selected("custom-diffusion", "textual-inversion") == (CUSTOM_DIFFUSION, TEXTUAL_INVERSION)
    assert selected("perfusion") == ()
    with pytest.raises(UserError, match="--methods dreamboth: unknown; give some of textual-inversion"):
        selected("dreamboth")


def test_prompts_come_from_all_categories_in_turn() -> None:
    prompts = [EvaluationPrompt(category, f"{number}") for number, category in enumerate("aaabbc")]
    assert [prompt.text for prompt in select_prompts(prompts, 4)] == ["0", "1", "3", "5"]
    assert select_prompts(prompts, 99) == prompts


def test_remaining_time_is_estimated_once_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(trainings=3, images=100)
    assert progress.remaining() == "left are 3 trainings and 100 images"
    progress.report("trained", "trainings", 1, 120.0)
    progress.report("generated", "images", 50, 30.0)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "  generated: 30.0 s; about 4 min left, 2 trainings and 50 images")


def test_quick_reduces_amounts_and_never_raises_them() -> None:
    options = parse_arguments(["--quick", "--seeds", "1", "--evaluation_clip", "x"])
    assert (options.seeds, options.concepts, options.train_steps, options.biases) == (1, 2, 50, (0.1, 0.3, 0.75, 1.3))
    assert options.comparison_biases == (0.3, 0.75)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--config", "nowhere.yaml"], "--config nowhere.yaml"), (["--only", "beauty"], "invalid choice"),
    (["--concepts", "1"], "must be 2 or more"), (["--biases", "0.9", "0.4", "--evaluation_clip", "x"], "rising"),
    (["--biases", "0.4", "0.9", "--other_biases", "0.5", "--evaluation_clip", "x"], "--other_biases 0.5: give some of"),
    (["--prompts", "nowhere.txt", "--evaluation_clip", "x"], "nowhere.txt"),
    (["--methods", "nowhere.yaml"], "--methods nowhere.yaml: unknown")])
def test_mistakes_are_reported_in_one_line(arguments: list[str], expected: str, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_line(reproduce.main, [*arguments, "--outdir", str(tmp_path)], capsys)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys
sys.path.insert(0, {str(PROJECT_ROOT)!r})
from evaluation.paper.folder_lock import lock_folder
with lock_folder("--outdir", {str(tmp_path)!r}):
    print("locked", flush=True)
    sys.stdin.read()
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        line = error_line(reproduce.main, ["--outdir", str(tmp_path)], capsys)
        assert f"--outdir {tmp_path}: another run is writing to this folder" in line
    finally:
        holder.kill()
        holder.wait()
    with lock_folder("--outdir", tmp_path):  # the lock of a killed process is released
        assert (tmp_path / LOCK_NAME).exists()


def test_a_lock_file_that_was_left_behind_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("12345")
    with lock_folder("--outdir", tmp_path), pytest.raises(UserError, match="another run"), \
            lock_folder("--outdir", tmp_path):
        pass


def test_help_lists_studies_and_methods_without_loading_torch() -> None:
    script = ("import runpy, sys; sys.argv = ['reproduce.py', '--help']\n"
              "try: runpy.run_path('evaluation/reproduce.py', run_name='__main__')\n"
              "except SystemExit: pass\n"
              "print('torch' in sys.modules)")
    environment = {**os.environ, "COLUMNS": "1000"}  # argparse would wrap names at hyphens
    shown = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, env=environment, capture_output=True,
                           text=True, check=True)
    words = " ".join(shown.stdout.split())
    assert words.endswith("False")
    assert all(key in words for key in STUDIES) and all(method.key in words for method in BASELINES)
