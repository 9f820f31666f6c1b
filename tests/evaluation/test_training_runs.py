"""Concepts taught by processes, with a stand-in for main.py: what is made, kept, made again, and what goes wrong."""
from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.paper import training_runs as teaching
from evaluation.paper.source_digest import TEACHING, code_of
from evaluation.paper.studies import NO_MASKS, ONE_PHOTO, PERFUSION, TEXTUAL_INVERSION, TRAINED_KEYS, Method
from evaluation.paper.training_runs import Cost, Example, School, digest, key_of
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
(run.parent / "prior" / "pictures").touch()
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
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for main.py, a config, a base model, and photos of two things."""
    (tmp_path / "main.py").write_text(STAND_IN)
    (tmp_path / "base.ckpt").write_text("weights")
    (tmp_path / "perfusion.yaml").write_text(CONFIG % (tmp_path / "base.ckpt"))
    concept = Concept("<b>", "a", torch.ones(1, 4), torch.ones(3), torch.ones(3), {"layer": torch.ones(5)}, steps=3)
    save_perfusion_concepts(tmp_path / "concept.safetensors", [concept])
    for name in ("cat", "owl"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (16, 16), (number, len(name), 0)).save(tmp_path / name / f"{number}.png")
    monkeypatch.setattr(teaching, "MAIN", tmp_path / "main.py")
    return tmp_path


@pytest.fixture
def school(place: Path) -> School:
    return School(str(place / "perfusion.yaml"), place / "out", at_once=2, machine="two cores")


def example(place: Path, name: str = "cat") -> Example:
    return Example(name, place / name, "cat")


def forget() -> None:
    """As a new run: files may have changed."""
    digest.cache_clear()
    School.key.cache_clear()


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines()


def test_what_is_missing_is_taught_and_kept(place: Path, school: School) -> None:
    wanted = [(method, example(place, name)) for method in (PERFUSION, TRAINED_KEYS) for name in ("cat", "owl")]
    done = list(school.teach(wanted))
    assert sorted((method.name, one.name) for method, one, _ in done) == sorted(
        (method.name, one.name) for method, one in wanted)
    for method, one, cost in done:
        file = school.file(method, one)
        assert cost == school.cost(method, one) == Cost(cost.seconds, 9, file.stat().st_size,
                                                        "two cores, 2 trainings at once")
        assert file.read_bytes() == (place / "concept.safetensors").read_bytes()
        assert cost.seconds > 0
    (prior,) = [path for path in (place / "out" / "runs").rglob("*") if path.is_file()]
    assert prior.name == "pictures"  # shared by all, and kept
    assert not list(school.teach(wanted)) and len(calls(place)) == 4


def test_seconds_are_the_processors(place: Path, school: School) -> None:
    seconds = []
    for does in ("time.sleep(0.5)", "while time.process_time() < 0.5: pass"):
        (place / "main.py").write_text(f"import time\n{does}\n")
        seconds.append(school._run([]))
    assert 0 < seconds[0] < 0.5 <= seconds[1]


def test_runs_are_told_what_a_user_would_say(place: Path, school: School) -> None:
    list(school.teach([(NO_MASKS, example(place)), (replace(TRAINED_KEYS, name="x"), example(place, "owl"))]))
    plain, keys = sorted(calls(place), key=lambda call: "owl" in call)
    for words in (f"--data_root {place / 'cat'}", "--init_word cat", "--placeholder_string <my-cat>", "--masks none",
                  "lightning.callbacks.previews=null"):
        assert words in plain
    assert "model.params.locking=trained" in keys and "--masks" not in keys


def test_one_photo_is_the_first(place: Path, school: School) -> None:
    list(school.teach([(ONE_PHOTO, example(place))]))
    folder = Path(calls(place)[0].partition("--data_root ")[2].split()[0])
    assert [path.name for path in folder.iterdir()] == ["0.png"]
    assert (folder / "0.png").read_bytes() == (place / "cat" / "0.png").read_bytes()


@pytest.mark.parametrize("name", ["0.png", "00.png"])
def test_another_first_photo_takes_the_place_of_the_first(place: Path, school: School, name: str) -> None:
    first = school.key(ONE_PHOTO, example(place))
    (place / "cat" / "0.png").unlink()
    Image.new("RGB", (16, 16), "red").save(place / "cat" / name)
    forget()
    assert school.key(ONE_PHOTO, example(place)) != first
    (copy,) = (place / "out" / "photos" / "first-1" / "cat").iterdir()
    assert copy.name == name and copy.read_bytes() == (place / "cat" / name).read_bytes()


def test_a_name_stands_for_all_that_matters(place: Path, school: School) -> None:
    def key(method: Method = PERFUSION, **changes: object) -> str:
        forget()
        return replace(school, **changes).key(method, example(place))

    first = key()
    assert key(folder=place / "elsewhere", at_once=1) == first
    others = {key(NO_MASKS), key(TRAINED_KEYS), key(ONE_PHOTO), key(TEXTUAL_INVERSION), key(steps=7),
              key(accelerator="cpu")}
    (place / "base.ckpt").write_text("other weights")
    others.add(key())
    Image.new("RGB", (16, 16), "red").save(place / "cat" / "1.png")
    others.add(key())
    assert len(others | {first}) == 8 - 1 + 1  # NO_MASKS is as PERFUSION here: its config has no segmenter


def test_what_was_made_otherwise_is_made_again(place: Path, school: School) -> None:
    list(school.teach([(PERFUSION, example(place))]))
    assert not school.outdated(PERFUSION, example(place))
    Image.new("RGB", (16, 16), "red").save(place / "cat" / "1.png")
    forget()
    assert school.outdated(PERFUSION, example(place)) and not school.outdated(NO_MASKS, example(place, "owl"))
    assert len(list(school.teach([(PERFUSION, example(place))]))) == 1


def test_an_interrupted_run_leaves_nothing_in_the_way(place: Path, school: School) -> None:
    runs = place / "out" / "runs" / code_of(TEACHING)
    shutil.copytree(place / "owl", runs / "before_perfusion-cat")
    (runs / "before_perfusion-cat" / "concept.safetensors").touch()
    assert not school.is_there(PERFUSION, example(place))
    assert len(list(school.teach([(PERFUSION, example(place))]))) == 1


def test_other_code_teaches_anew(place: Path, school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    first = school.key(PERFUSION, example(place))
    forget()
    monkeypatch.setattr(teaching, "code_of", lambda files: f"other code in {len(files)} files")
    assert school.key(PERFUSION, example(place)) != first


def test_weights_in_the_working_folder_are_told_apart(place: Path, school: School,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    keys = set()
    for name, content in (("a.ckpt", "weights"), ("b.ckpt", "weights"), ("a.ckpt", "others")):
        Path(name).write_text(content)
        forget()
        keys.add(replace(school, checkpoint=name).key(PERFUSION, example(place)))
    assert len(keys) == 3


def test_a_run_that_was_stopped_at_its_start_is_told_of(place: Path, school: School,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(School, "_run", lambda *_: 1.0)
    with pytest.raises(UserError, match="cat by Perfusion was stopped before it began; run this again"):
        list(school.teach([(PERFUSION, example(place))]))
    assert not school.is_there(PERFUSION, example(place))


def test_a_run_that_was_stopped_early_does_not_count(place: Path, school: School) -> None:
    config = place / "perfusion.yaml"
    config.write_text(config.read_text().replace("max_steps: 3", "max_steps: 4"))
    with pytest.raises(UserError, match="cat by Perfusion stopped at step 3 of 4"):
        list(school.teach([(PERFUSION, example(place))]))
    assert not school.is_there(PERFUSION, example(place)) and not list((place / "out").glob("concepts/*/*"))


def test_a_failure_says_what_the_run_said(place: Path, school: School) -> None:
    with pytest.raises(UserError, match="main.py --base .* --name perfusion-cat.*: no patience"):
        list(replace(school, steps=3).teach([(PERFUSION, example(place))]))
    assert not list((place / "out").rglob("*.safetensors"))


def test_what_is_left_early_leaves_no_training_behind(place: Path, school: School) -> None:
    script = place / "main.py"
    script.write_text(f"{STAND_IN}\nif 'owl' in given['--name']:\n"
                      "    import os, time\n"
                      f"    pathlib.Path(r'{place}', 'number').write_text(str(os.getpid()))\n"
                      "    time.sleep(300)\n"
                      "else:\n"
                      f"    while not pathlib.Path(r'{place}', 'number').exists(): pass\n")
    teaching = school.teach([(PERFUSION, example(place)), (PERFUSION, example(place, "owl"))])
    assert next(teaching)[1].name == "cat"
    teaching.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((place / "number").read_text()), 0)


def test_names_do_not_depend_on_where_the_project_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(root: Path) -> str:
        monkeypatch.setattr(teaching, "ROOT", root)
        return key_of({"photos": str(root / "models/teddy"), "file": root / "base.ckpt", "mine": "/elsewhere/teddy"})

    assert name(Path("/here/project")) == name(Path("/there"))
    assert name(Path("/elsewhere")) != name(Path("/there"))
