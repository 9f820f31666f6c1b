"""Learning concepts from Python: the same concept as by main.py, from any folder and in any thread."""
from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.training_setup import FEW_IMAGES, QUICK, ROOT, in_project_root, train_main

from ldm.common.errors import UserError
from ldm.inference import PerfusionPipeline
from ldm.training import TrainedConcept, train_concept

TEDDY = ROOT / "models" / "mini" / "examples" / "teddy"
TEAPOT = ROOT / "models" / "mini" / "examples" / "teapot"
SMALL = (*FEW_IMAGES, "data.params.batch_size=2")


def train_one(folder: Path, **changes: object) -> TrainedConcept:
    settings = {"max_steps": 2, "logdir": folder, "overrides": SMALL, "placeholder": "<my-teddy>", **changes}
    with in_project_root():
        return train_concept(TEDDY, "teddy bear", **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedConcept:
    return train_one(tmp_path_factory.mktemp("python"))


@pytest.mark.slow
def test_the_concept_equals_that_of_main(trained: TrainedConcept, tmp_path: Path) -> None:
    logdir = train_main(tmp_path, *QUICK, "--data_root", TEDDY)
    assert trained.path.read_bytes() == (logdir / "concept.safetensors").read_bytes()
    assert trained.path.parent == trained.logdir and trained.logdir.name.endswith("_perfusion")
    concept = trained.concept
    assert (concept.placeholder, concept.super_category, concept.steps) == ("<my-teddy>", "teddy bear", 2)
    assert trained.steps == 2 and len(trained.paths) == len(trained.concepts) == 1


@pytest.mark.slow
def test_the_working_directory_and_the_thread_do_not_matter(trained: TrainedConcept, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: Ctrl-C keeps its handler, and torch its settings."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    handler, results = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        try:
            results.append(train_concept(TEDDY, "teddy bear", "<my-teddy>", max_steps=2, overrides=SMALL))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    (result,) = results
    assert isinstance(result, TrainedConcept), result
    assert result.logdir.parent.resolve() == tmp_path / "logs"
    assert result.path.read_bytes() == trained.path.read_bytes()
    assert signal.getsignal(signal.SIGINT) is handler and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_no_module_called_main_is_needed(tmp_path: Path) -> None:
    """Configs name classes by main.py; a user's own main.py must not be taken for it."""
    (tmp_path / "main.py").write_text("raise RuntimeError('a module of the user')")
    code = f"import sys; sys.path.append({str(ROOT)!r})\nfrom ldm.util import get_obj_from_str\n" \
           "print(get_obj_from_str('main.DataModuleFromConfig').__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ldm.data.module"


@pytest.mark.slow
def test_what_is_learned_can_be_generated_with(trained: TrainedConcept) -> None:
    pipe = PerfusionPipeline.from_pretrained("models/mini", device="cpu")
    pipe.load_concepts(trained.path)
    (image,) = pipe("a <my-teddy> on the beach", seed=1, num_inference_steps=1).images
    assert image.size == (64, 64)


@pytest.mark.slow
def test_several_concepts(tmp_path: Path) -> None:
    with in_project_root():
        trained = train_concept([TEDDY, TEAPOT], ["teddy bear", "teapot"], ["<teddy>", "<teapot>"], max_steps=1,
                                logdir=tmp_path, masks="none", overrides=[*SMALL, "lightning.callbacks.previews=null"])
    assert [path.name for path in trained.paths] == ["teddy.safetensors", "teapot.safetensors"]
    assert [concept.super_category for concept in trained.concepts] == ["teddy bear", "teapot"]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "message"), [
    ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"), ({"placeholder": "two words"}, "two words"),
    ({"masks": "nowhere"}, "nowhere: no such folder"), ({"checkpoint": "nowhere.ckpt"}, "nowhere.ckpt: no such file"),
    ({"overrides": ["bias"]}, "bias: neither a flag"), ({"max_steps": 0}, "max_steps 0"),
])
def test_mistakes_raise_a_user_error(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_one(tmp_path / "logs", **settings)
    assert not (tmp_path / "logs").exists()


def test_command_lines_and_options_need_no_torch() -> None:
    code = "import sys, main\nimport ldm.training.config, ldm.training.options\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
