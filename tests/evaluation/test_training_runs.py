"""Concepts trained by processes, with a stand-in for main.py: what is made, reused, made again, and what fails."""
from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.paper import file_keys, training_runs
from evaluation.paper.design import Method
from evaluation.paper.examples import ExampleConcept
from evaluation.paper.file_keys import content_digest, short_key
from evaluation.paper.methods import NO_MASKS, ONE_PHOTO, PERFUSION, TEXTUAL_INVERSION, TRAINED_KEYS
from evaluation.paper.processes import ProcessGroup
from evaluation.paper.results import TrainingCost
from evaluation.paper.source_digest import clear_caches
from evaluation.paper.training_runs import TrainingRuns
from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import save_perfusion_concepts

STAND_IN = """
import pathlib, shutil, sys
given = dict(zip(sys.argv[1:], sys.argv[2:]))
run = pathlib.Path(given["--logdir"]) / ("now_" + given["--name"])
run.mkdir(parents=True)
(run / "last.ckpt").write_text("")
(run.parent / "prior").mkdir(exist_ok=True)
(run.parent / "prior" / "images").touch()
if "--max_steps" in given:
    sys.exit("error: no patience")
shutil.copy(pathlib.Path(__file__).parent / "concept.safetensors", run)
with open(pathlib.Path(__file__).parent / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
"""
CONFIG = """
model:
  target: ldm.personalization.perfusion.Perfusion
  params: {super_category: a, placeholder: <b>, bias: 0.75, locking: local, segmenter: null, ckpt_path: %s}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 2, train: {target: ldm.data.personalized.PersonalizedBase, params: {data_root: c}}}
lightning: {trainer: {max_steps: 3}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a stand-in for main.py, a config, a base model, and photos of two subjects."""
    (tmp_path / "main.py").write_text(STAND_IN)
    (tmp_path / "base.ckpt").write_text("weights")
    (tmp_path / "perfusion.yaml").write_text(CONFIG % (tmp_path / "base.ckpt"))
    concept = Concept("<b>", "a", torch.ones(1, 4), torch.ones(3), torch.ones(3), {"layer": torch.ones(5)}, steps=3)
    save_perfusion_concepts(tmp_path / "concept.safetensors", [concept])
    for name in ("cat", "owl"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (16, 16), (number, len(name), 0)).save(tmp_path / name / f"{number}.png")
    monkeypatch.setattr(training_runs, "MAIN", tmp_path / "main.py")
    return tmp_path


@pytest.fixture
def runs(folder: Path) -> TrainingRuns:
    return TrainingRuns(str(folder / "perfusion.yaml"), folder / "out", workers=2, machine="two cores")


def example(folder: Path, name: str = "cat") -> ExampleConcept:
    return ExampleConcept(name, folder / name, "cat")


def forget_files() -> None:
    """Start anew, as another process would: files may have changed."""
    content_digest.cache_clear()
    TrainingRuns.key.cache_clear()


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.slow
def test_missing_concepts_are_trained_once(folder: Path, runs: TrainingRuns) -> None:
    pairs = [(method, example(folder, name)) for method in (PERFUSION, TRAINED_KEYS) for name in ("cat", "owl")]
    finished = list(runs.train(pairs))
    assert sorted((method.name, one.name) for method, one, _ in finished) == sorted(
        (method.name, one.name) for method, one in pairs)
    for method, one, cost in finished:
        file = runs.concept_file(method, one)
        assert cost == runs.read_cost(method, one) == TrainingCost(cost.seconds, 9, file.stat().st_size,
                                                                   "two cores, 2 trainings at once")
        assert file.read_bytes() == (folder / "concept.safetensors").read_bytes()
        assert cost.seconds > 0
    (prior,) = [path for path in (folder / "out" / "runs").rglob("*") if path.is_file()]
    assert prior.name == "images"  # prior images are shared by all runs, and kept
    assert not list(runs.train(pairs)) and len(calls(folder)) == 4


@pytest.mark.slow
def test_seconds_are_processor_time(folder: Path, runs: TrainingRuns) -> None:
    seconds = []
    for statement in ("time.sleep(0.5)", "while time.process_time() < 0.5: pass"):
        (folder / "main.py").write_text(f"import time\n{statement}\n")
        seconds.append(runs._run_main([], ProcessGroup()))
    assert 0 < seconds[0] < 0.5 <= seconds[1]


def test_runs_get_the_arguments_that_users_give(folder: Path, runs: TrainingRuns) -> None:
    list(runs.train([(NO_MASKS, example(folder)), (replace(TRAINED_KEYS, name="x"), example(folder, "owl"))]))
    plain, keys = sorted(calls(folder), key=lambda call: "owl" in call)
    for words in (f"--data_root {folder / 'cat'}", "--init_word cat", "--placeholder_string <my-cat>", "--masks none",
                  "lightning.callbacks.previews=null"):
        assert words in plain
    assert "model.params.locking=trained" in keys and "--masks" not in keys


def test_one_photo_is_the_first(folder: Path, runs: TrainingRuns) -> None:
    list(runs.train([(ONE_PHOTO, example(folder))]))
    copied = Path(calls(folder)[0].partition("--data_root ")[2].split()[0])
    assert [path.name for path in copied.iterdir()] == ["0.png"]
    assert (copied / "0.png").read_bytes() == (folder / "cat" / "0.png").read_bytes()


@pytest.mark.parametrize("name", ["0.png", "00.png"])
def test_another_first_photo_replaces_the_copy(folder: Path, runs: TrainingRuns, name: str) -> None:
    first = runs.key(ONE_PHOTO, example(folder))
    (folder / "cat" / "0.png").unlink()
    Image.new("RGB", (16, 16), "red").save(folder / "cat" / name)
    forget_files()
    assert runs.key(ONE_PHOTO, example(folder)) != first
    (copy,) = (folder / "out" / "photos" / "first-1" / "cat").iterdir()
    assert copy.name == name and copy.read_bytes() == (folder / "cat" / name).read_bytes()


def test_keys_cover_everything_that_matters(folder: Path, runs: TrainingRuns) -> None:
    def key(method: Method = PERFUSION, **changes: object) -> str:
        forget_files()
        return replace(runs, **changes).key(method, example(folder))

    first = key()
    assert key(folder=folder / "elsewhere", workers=1) == first
    others = {key(NO_MASKS), key(TRAINED_KEYS), key(ONE_PHOTO), key(TEXTUAL_INVERSION), key(steps=7),
              key(accelerator="cpu")}
    (folder / "base.ckpt").write_text("other weights")
    others.add(key())
    Image.new("RGB", (16, 16), "red").save(folder / "cat" / "1.png")
    others.add(key())
    assert len(others | {first}) == 9


def test_outdated_concepts_are_trained_again(folder: Path, runs: TrainingRuns) -> None:
    list(runs.train([(PERFUSION, example(folder))]))
    assert not runs.is_outdated(PERFUSION, example(folder))
    Image.new("RGB", (16, 16), "red").save(folder / "cat" / "1.png")
    forget_files()
    assert runs.is_outdated(PERFUSION, example(folder)) and not runs.is_outdated(NO_MASKS, example(folder, "owl"))
    assert len(list(runs.train([(PERFUSION, example(folder))]))) == 1


def test_an_interrupted_run_leaves_nothing_in_the_way(folder: Path, runs: TrainingRuns) -> None:
    interrupted = runs._runs_folder() / "before_perfusion-cat"
    shutil.copytree(folder / "owl", interrupted)
    (interrupted / "concept.safetensors").touch()
    assert not runs.is_finished(PERFUSION, example(folder))
    assert len(list(runs.train([(PERFUSION, example(folder))]))) == 1


@pytest.fixture
def my_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """Write a method of a user's own: a class in a file outside the project, and its config."""
    (folder / "users_method.py").write_text("from ldm.personalization.textual_inversion import TextualInversion\n"
                                            "class Mine(TextualInversion):\n    LIMIT = 1.0\n")
    (folder / "mine.yaml").write_text("model: {target: users_method.Mine, params: {}}\n")
    monkeypatch.syspath_prepend(folder)
    clear_caches()
    yield Method("mine", str(folder / "mine.yaml"))
    sys.modules.pop("users_method", None)
    clear_caches()


@pytest.mark.slow
def test_a_change_of_a_new_methods_code_trains_it_again_and_no_other(folder: Path, runs: TrainingRuns, my_method: Method
                                                                     ) -> None:
    def keys() -> list[str]:
        forget_files()
        clear_caches()
        return [runs.key(method, example(folder)) for method in (my_method, PERFUSION)]

    before = keys()
    source = folder / "users_method.py"
    source.write_text(source.read_text() + "# a comment\n")
    assert keys() == before
    source.write_text(source.read_text().replace("1.0", "2.0"))
    assert keys()[0] != before[0] and keys()[1] == before[1]


@pytest.mark.slow
def test_other_code_trains_again(folder: Path, runs: TrainingRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.key(PERFUSION, example(folder))
    forget_files()
    monkeypatch.setattr(training_runs, "code_digest", lambda entries: f"other code of {len(entries)} entries")
    assert runs.key(PERFUSION, example(folder)) != first


def test_weights_in_the_working_directory_are_distinguished(folder: Path, runs: TrainingRuns,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    keys = set()
    for name, content in (("a.ckpt", "weights"), ("b.ckpt", "weights"), ("a.ckpt", "others")):
        Path(name).write_text(content)
        forget_files()
        keys.add(replace(runs, checkpoint=name).key(PERFUSION, example(folder)))
    assert len(keys) == 3


def test_a_run_that_was_stopped_at_its_start_is_reported(folder: Path, runs: TrainingRuns,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRuns, "_run_main", lambda *_: 1.0)
    with pytest.raises(UserError, match="cat by Perfusion was stopped before it began; run this again"):
        list(runs.train([(PERFUSION, example(folder))]))
    assert not runs.is_finished(PERFUSION, example(folder))


def test_a_run_that_was_stopped_early_does_not_count(folder: Path, runs: TrainingRuns) -> None:
    config = folder / "perfusion.yaml"
    config.write_text(config.read_text().replace("max_steps: 3", "max_steps: 4"))
    with pytest.raises(UserError, match="cat by Perfusion stopped at step 3 of 4"):
        list(runs.train([(PERFUSION, example(folder))]))
    assert not runs.is_finished(PERFUSION, example(folder)) and not list((folder / "out").glob("concepts/*/*"))


def test_a_failure_repeats_the_message_of_the_run(folder: Path, runs: TrainingRuns) -> None:
    with pytest.raises(UserError, match="main.py --base .* --name perfusion-cat.*: no patience"):
        list(replace(runs, steps=3).train([(PERFUSION, example(folder))]))
    assert not list((folder / "out").rglob("*.safetensors"))


def test_closing_early_ends_trainings_that_run(folder: Path, runs: TrainingRuns) -> None:
    (folder / "main.py").write_text(
        f"{STAND_IN}\nif 'owl' in given['--name']:\n"
        "    import os, time\n"
        f"    pathlib.Path(r'{folder}', 'number').write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
        "else:\n"
        f"    while not pathlib.Path(r'{folder}', 'number').exists(): pass\n")
    finished = runs.train([(PERFUSION, example(folder)), (PERFUSION, example(folder, "owl"))])
    assert next(finished)[1].name == "cat"
    finished.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "number").read_text()), 0)


@pytest.mark.slow
def test_closing_early_starts_no_training(folder: Path, runs: TrainingRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that a thread has picked up, but not started yet, is not started any more."""
    is_closed = threading.Event()
    remove_runs = training_runs._remove_runs

    def wait_and_remove(folder: Path, name: str) -> None:
        if "owl" in name:
            is_closed.wait(60)
        remove_runs(folder, name)

    monkeypatch.setattr(training_runs, "_remove_runs", wait_and_remove)
    finished = runs.train([(PERFUSION, example(folder)), (PERFUSION, example(folder, "owl"))])
    assert next(finished)[1].name == "cat"
    release = threading.Timer(0.5, is_closed.set)
    release.start()
    finished.close()
    release.join()
    assert is_closed.is_set() and len(calls(folder)) == 1  # of the cat alone


def test_keys_do_not_depend_on_where_the_project_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(root: Path) -> str:
        monkeypatch.setattr(file_keys, "PROJECT_ROOT", root)
        return short_key({"photos": str(root / "models/teddy"), "file": root / "base.ckpt", "mine": "/elsewhere/teddy"})

    assert key(Path("/here/project")) == key(Path("/there"))
    assert key(Path("/elsewhere")) != key(Path("/there"))
