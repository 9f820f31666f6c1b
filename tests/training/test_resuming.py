"""Runs that are stopped, by Ctrl-C, by force or by themselves, and go on to the result of one that is not."""
from __future__ import annotations

import functools
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.training_setup import BASE, FEW_IMAGES, QUICK, load_state, resume_run, run_main, start_process, train_main
from PIL import Image

from ldm.common.errors import UserError
from ldm.concepts.concept_file import load_perfusion_concepts

STEPS = 12
WAITING = "lightning.callbacks.waiting"
LONG = (*FEW_IMAGES, "--max_steps", STEPS, "data.params.batch_size=4")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_main(tmp_path_factory.mktemp("straight"), *LONG)


def same(logdir: Path, other: Path) -> None:
    """Both runs end in the same concept file, and the last checkpoint has the same numbers in full precision."""
    assert (logdir / "concept.safetensors").read_bytes() == (other / "concept.safetensors").read_bytes()
    ours, theirs = load_state(logdir), load_state(other)
    assert ours["global_step"] == theirs["global_step"] and ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name


def signalled(folder: Path, number: int, batch: int, *arguments: object) -> tuple[int, str]:
    """Starts a run in `folder` and signals it in its batch `batch`; exit status and whole output."""
    process = start_process("main.py", *BASE, "-l", folder, *LONG, f"{WAITING}.target=helpers.training_setup.WaitForInterrupt",
                    f"{WAITING}.params.batch={batch}", *arguments)
    output = ""
    for line in process.stdout:
        output += line
        if "waiting for a signal" in line:
            process.send_signal(number)
    return process.wait(), output


def test_ctrl_c_keeps_the_concept_and_says_how_to_go_on(straight: Path, tmp_path: Path) -> None:
    status, output = signalled(tmp_path, signal.SIGINT, 3)
    (logdir,) = tmp_path.iterdir()
    assert status == 0 and "Traceback" not in output, output
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    assert concept.steps == load_state(logdir)["global_step"] == 4
    command = re.search(r"stopped after 4 steps; go on with: python main.py (.*)", output)
    resume_run(logdir, *shlex.split(command[1])[2:], f"{WAITING}.params.batch=-1")
    assert shlex.split(command[1])[:2] == ["--resume", str(logdir)]
    same(logdir, straight)
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    assert concept.steps == STEPS
    assert [path.name for path in (logdir / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_killed_run_goes_on_from_its_last_checkpoint(straight: Path, tmp_path: Path) -> None:
    status, output = signalled(tmp_path, signal.SIGKILL, 6, "lightning.modelcheckpoint.every_n_train_steps=4")
    (logdir,) = tmp_path.iterdir()
    assert status == -signal.SIGKILL, output
    assert load_state(logdir)["global_step"] == 4 and not (logdir / "concept.safetensors").exists()
    same(resume_run(logdir, f"{WAITING}.params.batch=-1"), straight)


def short(parts: int, *arguments: object) -> tuple[object, ...]:
    """A run of 6 steps of `parts` batches; an epoch has 5 batches, so that its last step may have fewer."""
    return (*QUICK, "--max_steps", 6, "data.params.train.params.repeats=2",
            f"lightning.trainer.accumulate_grad_batches={parts}", *arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Such runs with a checkpoint of every step."""

    @functools.cache
    def run(parts: int) -> Path:
        return train_main(tmp_path_factory.mktemp("whole"), *short(parts), "lightning.modelcheckpoint.every_n_train_steps=1",
                     "lightning.modelcheckpoint.save_top_k=-1")

    return run


@pytest.mark.parametrize(("parts", "step"), [(1, 2), (1, 5), (2, 1), (2, 3)])
def test_going_on_from_any_checkpoint(whole: Callable[[int], Path], tmp_path: Path, parts: int, step: int) -> None:
    """Within and at the end of an epoch."""
    shutil.copytree(whole(parts), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob(f"*-{step:08}.ckpt")
    (tmp_path / "run" / "concept.safetensors").unlink()
    resume_run(checkpoint)
    same(tmp_path / "run", whole(parts))


@pytest.mark.parametrize(("parts", "steps"), [(1, 4), (1, 5), (2, 3)])
def test_a_run_of_more_steps_is_a_longer_run(
    whole: Callable[[int], Path], tmp_path: Path, parts: int, steps: int
) -> None:
    logdir = train_main(tmp_path, *short(parts), "--max_steps", steps)
    assert load_state(logdir)["global_step"] == steps
    same(resume_run(logdir, "--max_steps", 6), whole(parts))


@pytest.mark.parametrize("interval", [4, 6, 100])
def test_the_last_checkpoint_is_of_the_last_step(tmp_path: Path, interval: int) -> None:
    logdir = train_main(tmp_path, *short(1), f"lightning.modelcheckpoint.every_n_train_steps={interval}")
    assert load_state(logdir)["global_step"] == 6


@pytest.mark.parametrize(("parts", "batch", "steps"), [(1, 4, 5), (2, 2, 2)])
def test_ctrl_c_ends_with_a_whole_step(
    whole: Callable[[int], Path], tmp_path: Path, parts: int, batch: int, steps: int
) -> None:
    logdir = train_main(tmp_path, *short(parts), "lightning.callbacks.ctrl_c.target=helpers.training_setup.InterruptAt",
                   f"lightning.callbacks.ctrl_c.params.batch={batch}")
    assert load_state(logdir)["global_step"] == steps
    same(resume_run(logdir, "lightning.callbacks.ctrl_c.params.batch=-1"), whole(parts))


def test_a_resumed_run_shows_its_pictures_from_the_start(tmp_path: Path) -> None:
    logdir = train_main(tmp_path / "logs", *QUICK, "lightning.callbacks.previews.params.during=0")
    sheet = logdir / "images" / "before_during_after.png"
    rows_before = Image.open(sheet).height  # photos, before, after
    resume_run(logdir / "checkpoints" / "last.ckpt", "--max_steps", 3)
    assert Image.open(sheet).height == pytest.approx(rows_before * 4 / 3, rel=0.02)  # and resumed


@pytest.mark.parametrize("change", [
    lambda weights: weights.update({"concepts.0.embedding": torch.ones(1, 7)}),  # of another text encoder
    lambda weights: weights.pop("concepts.0.embedding"),
    lambda weights: (weights.clear(), weights.update({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)})),
], ids=["shape", "missing", "autoencoder"])
def test_a_checkpoint_of_another_model(
    whole: Callable[[int], Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    shutil.copytree(whole(1), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    change(state["state_dict"])
    torch.save(state, checkpoint)
    before = sorted((tmp_path / "run").glob("[!t]*/*"))  # tensorboard/ notes every start
    with pytest.raises(UserError, match=rf"--resume {re.escape(str(checkpoint))}: is of another model than") as refused:
        resume_run(tmp_path / "run", "--max_steps", 7)
    assert "\n" not in str(refused.value) and "give the run's own config" in str(refused.value)
    assert sorted((tmp_path / "run").glob("[!t]*/*")) == before


@pytest.mark.parametrize("most", [(), ("--max_steps", 5)])
def test_a_run_that_is_over(whole: Callable[[int], Path], most: tuple[object, ...]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole(1).rglob("*")}
    with pytest.raises(UserError, match=rf"has taken 6 steps of {most[-1] if most else 6}; to go on, give more"):
        resume_run(whole(1), *most)
    assert {path: path.stat().st_mtime_ns for path in whole(1).rglob("*")} == before


@pytest.mark.parametrize("given", ["nowhere", "", "last.ckpt"])
def test_nothing_to_go_on_from(tmp_path: Path, given: str) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=re.escape(f"--resume {tmp_path / 'run' / given}: ")):
        run_main(["--resume", str(tmp_path / "run" / given)])
    assert not list((tmp_path / "run").iterdir())
