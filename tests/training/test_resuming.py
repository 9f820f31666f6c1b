"""Runs that Ctrl-C, a kill or their own end stops, and that resume to the result of an uninterrupted run."""
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
LONG_RUN = (*FEW_IMAGES, "--max_steps", STEPS, "data.params.batch_size=4")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_main(tmp_path_factory.mktemp("long_run"), *LONG_RUN)


def assert_same_result(logdir: Path, other: Path) -> None:
    """Compare the concept files of two runs and, in full precision, their last checkpoints."""
    assert (logdir / "concept.safetensors").read_bytes() == (other / "concept.safetensors").read_bytes()
    ours, theirs = load_state(logdir), load_state(other)
    assert ours["global_step"] == theirs["global_step"] and ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name


def run_and_signal(folder: Path, number: int, batch: int, *arguments: object) -> tuple[int, str]:
    """Start a run in `folder`, signal it in batch `batch`, and return its exit status and output."""
    process = start_process("main.py", *BASE, "-l", folder, *LONG_RUN,
                            f"{WAITING}.target=helpers.training_setup.WaitForInterrupt",
                            f"{WAITING}.params.batch={batch}", *arguments)
    output = ""
    for line in process.stdout:
        output += line
        if "waiting for a signal" in line:
            process.send_signal(number)
    return process.wait(), output


@pytest.mark.slow
def test_ctrl_c_saves_the_concept_and_prints_how_to_continue(long_run: Path, tmp_path: Path) -> None:
    status, output = run_and_signal(tmp_path, signal.SIGINT, 3)
    (logdir,) = tmp_path.iterdir()
    assert status == 0 and "Traceback" not in output, output
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    assert concept.steps == load_state(logdir)["global_step"] == 4
    command = re.search(r"stopped after 4 steps; continue with: python main.py (.*)", output)
    resume_run(logdir, *shlex.split(command[1])[2:], f"{WAITING}.params.batch=-1")
    assert shlex.split(command[1])[:2] == ["--resume", str(logdir)]
    assert_same_result(logdir, long_run)
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    assert concept.steps == STEPS
    assert [path.name for path in (logdir / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint(long_run: Path, tmp_path: Path) -> None:
    status, output = run_and_signal(tmp_path, signal.SIGKILL, 6, "lightning.modelcheckpoint.every_n_train_steps=4")
    (logdir,) = tmp_path.iterdir()
    assert status == -signal.SIGKILL, output
    assert load_state(logdir)["global_step"] == 4 and not (logdir / "concept.safetensors").exists()
    assert_same_result(resume_run(logdir, f"{WAITING}.params.batch=-1"), long_run)


def short_run(micro_batches: int, *arguments: object) -> tuple[object, ...]:
    """Return arguments for 6 steps of so many batches. An epoch has 5, so its last step may have fewer."""
    return (*QUICK, "--max_steps", 6, "data.params.train.params.repeats=2",
            f"lightning.trainer.accumulate_grad_batches={micro_batches}", *arguments)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Short runs with a checkpoint of every step."""

    @functools.cache
    def run(micro_batches: int) -> Path:
        return train_main(tmp_path_factory.mktemp("uninterrupted"), *short_run(micro_batches),
                          "lightning.modelcheckpoint.every_n_train_steps=1", "lightning.modelcheckpoint.save_top_k=-1")

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "step"), [(1, 2), (1, 5), (2, 1), (2, 3)])
def test_resuming_from_any_checkpoint(
    uninterrupted: Callable[[int], Path], tmp_path: Path, micro_batches: int, step: int
) -> None:
    """Within and at the end of an epoch."""
    shutil.copytree(uninterrupted(micro_batches), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob(f"*-{step:08}.ckpt")
    (tmp_path / "run" / "concept.safetensors").unlink()
    resume_run(checkpoint)
    assert_same_result(tmp_path / "run", uninterrupted(micro_batches))


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "steps"), [(1, 4), (1, 5), (2, 3)])
def test_resuming_with_more_steps_equals_a_longer_run(
    uninterrupted: Callable[[int], Path], tmp_path: Path, micro_batches: int, steps: int
) -> None:
    logdir = train_main(tmp_path, *short_run(micro_batches), "--max_steps", steps)
    assert load_state(logdir)["global_step"] == steps
    assert_same_result(resume_run(logdir, "--max_steps", 6), uninterrupted(micro_batches))


@pytest.mark.slow
@pytest.mark.parametrize("interval", [4, 6, 100])
def test_the_last_checkpoint_is_of_the_last_step(tmp_path: Path, interval: int) -> None:
    logdir = train_main(tmp_path, *short_run(1), f"lightning.modelcheckpoint.every_n_train_steps={interval}")
    assert load_state(logdir)["global_step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "batch", "steps"), [(1, 4, 5), (2, 2, 2)])
def test_ctrl_c_completes_the_step(
    uninterrupted: Callable[[int], Path], tmp_path: Path, micro_batches: int, batch: int, steps: int
) -> None:
    logdir = train_main(tmp_path, *short_run(micro_batches),
                        "lightning.callbacks.ctrl_c.target=helpers.training_setup.InterruptAt",
                        f"lightning.callbacks.ctrl_c.params.batch={batch}")
    assert load_state(logdir)["global_step"] == steps
    assert_same_result(resume_run(logdir, "lightning.callbacks.ctrl_c.params.batch=-1"), uninterrupted(micro_batches))


@pytest.mark.slow
def test_a_resumed_run_previews_the_start_again(tmp_path: Path) -> None:
    logdir = train_main(tmp_path / "logs", *QUICK, "lightning.callbacks.previews.params.during=0")
    sheet = logdir / "images" / "before_during_after.png"
    rows_before = Image.open(sheet).height  # photos, before, after
    resume_run(logdir / "checkpoints" / "last.ckpt", "--max_steps", 3)
    assert Image.open(sheet).height == pytest.approx(rows_before * 4 / 3, rel=0.02)  # and resumed


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda weights: weights.update({"concepts.0.embedding": torch.ones(1, 7)}),  # of another text encoder
    lambda weights: weights.pop("concepts.0.embedding"),
    lambda weights: (weights.clear(), weights.update({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)})),
], ids=["shape", "missing", "autoencoder"])
def test_a_checkpoint_of_another_model_raises_a_user_error(
    uninterrupted: Callable[[int], Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    shutil.copytree(uninterrupted(1), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    change(state["state_dict"])
    torch.save(state, checkpoint)
    before = sorted((tmp_path / "run").glob("[!t]*/*"))  # tensorboard/ notes every start
    message = rf"--resume {re.escape(str(checkpoint))}: belongs to another model than this config"
    with pytest.raises(UserError, match=message) as refused:
        resume_run(tmp_path / "run", "--max_steps", 7)
    assert "\n" not in str(refused.value) and "give the run's own config" in str(refused.value)
    assert sorted((tmp_path / "run").glob("[!t]*/*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--max_steps", 5)])
def test_a_finished_run_is_left_alone(uninterrupted: Callable[[int], Path], flags: tuple[object, ...],
                                      caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted(1).rglob("*")}
    with caplog.at_level("INFO"):
        resume_run(uninterrupted(1), *flags)
    assert f"has taken 6 steps of {flags[-1] if flags else 6}; to continue, give more" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in uninterrupted(1).rglob("*")} == before


@pytest.mark.parametrize("given", ["nowhere", "", "last.ckpt"])
def test_resuming_from_nothing_raises_a_user_error(tmp_path: Path, given: str) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=re.escape(f"--resume {tmp_path / 'run' / given}: ")):
        run_main(["--resume", str(tmp_path / "run" / given)])
    assert not list((tmp_path / "run").iterdir())
