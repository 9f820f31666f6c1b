"""Runs as folders: their states, the queue, and what a lost process or a damaged file does."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ldm.common.errors import UserError
from ldm.web import run_queue
from ldm.web.run_folder import RunFolder, RunSettings, RunState
from ldm.web.run_progress import read_progress
from ldm.web.run_queue import RunQueue, training_arguments

SETTINGS = RunSettings(title="My teddy", super_category="teddy bear", placeholder="<my-teddy>",
                       config="configs/perfusion.yaml", max_steps=20, seed=1)
SLEEPER = "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(0)); time.sleep({seconds})"


@pytest.fixture
def queue(tmp_path: Path) -> RunQueue:
    return RunQueue(tmp_path / "runs")


@pytest.fixture
def run(queue: RunQueue) -> RunFolder:
    created = queue.create()
    created.write_settings(SETTINGS)
    return created


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace training by a process that sleeps."""
    command = [sys.executable, "-c", SLEEPER.format(seconds=60)]
    monkeypatch.setattr(run_queue, "training_command", lambda _: command)


def write_progress(run: RunFolder, step: int, steps: int = 20, with_concept: bool = False) -> Path:
    folder = run.path / "training" / "2026-01-01T00-00-00_concept"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": number, "steps": steps, "loss": None if number == 0 else 0.5, "time": 10.0 + number}
             for number in range(step + 1)]
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if with_concept:
        (folder / "concept.safetensors").write_bytes(b"")
    return folder


def wait_for_end(queue: RunQueue, run: RunFolder) -> None:
    deadline = time.monotonic() + 20
    while queue.process_of(run) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_settings_survive_in_the_folder(run: RunFolder) -> None:
    assert run.read_settings() == SETTINGS
    run.rename("  Another\nname ")
    assert run.read_settings() == replace(SETTINGS, title="Another name")
    with pytest.raises(UserError, match="1 to 60"):
        run.rename("x" * 61)


def test_damaged_settings_are_named(run: RunFolder) -> None:
    (run.path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json"):
        run.read_settings()


def test_a_run_waits_trains_and_stops(queue: RunQueue, run: RunFolder, sleeping: None) -> None:
    assert queue.state(run) is RunState.DRAFT
    queue.enqueue(run)
    assert queue.state(run) is RunState.WAITING
    assert queue.start_next() == run
    assert queue.state(run) is RunState.RUNNING
    with pytest.raises(UserError, match="stop it first"):
        queue.delete(run)
    queue.stop(run)
    wait_for_end(queue, run)
    assert queue.state(run) is RunState.STOPPED
    queue.delete(run)
    assert not run.path.exists()


def test_one_run_trains_at_a_time_in_the_order_of_the_queue(queue: RunQueue, sleeping: None) -> None:
    runs = [queue.create() for _ in range(3)]
    for index, run in enumerate(runs):
        run.write_settings(SETTINGS)
        queue.enqueue(run)
        (run.path / "queued").write_text(str(100.0 - index))  # the last one waits longest
    assert queue.start_next() == runs[2]
    assert queue.start_next() is None
    queue.stop(runs[2])
    wait_for_end(queue, runs[2])
    assert queue.start_next() == runs[1]
    queue.stop(runs[1])
    wait_for_end(queue, runs[1])


def test_another_page_finds_the_process_again(queue: RunQueue, run: RunFolder, sleeping: None) -> None:
    queue.enqueue(run)
    queue.start_next()
    other = RunQueue(queue.root)
    assert other.state(other.run(run.name)) is RunState.RUNNING
    other.stop(run)
    wait_for_end(queue, run)
    assert other.state(run) is RunState.STOPPED


def test_a_killed_process_leaves_a_run_that_can_go_on(queue: RunQueue, run: RunFolder, sleeping: None) -> None:
    queue.enqueue(run)
    queue.start_next()
    queue.process_of(run).send_signal(signal.SIGKILL)
    wait_for_end(queue, run)
    assert queue.state(run) is RunState.INTERRUPTED
    queue.enqueue(run)
    assert queue.state(run) is RunState.WAITING


def test_another_process_with_the_same_id_is_not_the_run(queue: RunQueue, run: RunFolder) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER.format(seconds=30)]) as other:
        run.write_process(other.pid, psutil.Process(other.pid).create_time() - 500, [])
        assert queue.process_of(run) is None
        other.kill()


def test_the_error_of_a_failed_run_is_kept(queue: RunQueue, run: RunFolder) -> None:
    run.write_process(0, 0.0, [])
    run.log_file.write_text("masks\nerror: photos: too small\n")
    assert queue.state(run) is RunState.FAILED
    assert run.error() == "photos: too small"


def test_progress_reads_what_is_there(queue: RunQueue, run: RunFolder) -> None:
    assert read_progress(run).steps == 0
    folder = write_progress(run, 5)
    with (folder / "progress.jsonl").open("a") as file:
        file.write('{"step": 6, "ste')  # being written
    progress = read_progress(run)
    assert (progress.step, progress.steps, len(progress.losses)) == (5, 20, 5)
    assert progress.seconds_left == pytest.approx(15.0)
    assert progress.previews is None


def test_a_concept_of_all_steps_is_finished(queue: RunQueue, run: RunFolder) -> None:
    run.write_process(0, 0.0, [])
    write_progress(run, 12, with_concept=True)
    assert queue.state(run) is RunState.INTERRUPTED
    write_progress(run, 20, with_concept=True)
    assert queue.state(run) is RunState.FINISHED
    with pytest.raises(UserError, match="finished"):
        queue.enqueue(run)


@pytest.mark.parametrize("name", ["../outside", "..", "", "a/b", "A", ".hidden"])
def test_names_from_outside_reach_no_other_folder(queue: RunQueue, name: str) -> None:
    (queue.root.parent / "outside").mkdir()
    with pytest.raises(UserError, match="gone"):
        queue.run(name)


def test_arguments_are_those_of_main(run: RunFolder) -> None:
    from ldm.cli.training import parse_training_options

    options = parse_training_options(training_arguments(replace(SETTINGS, crop="center"), run))
    assert options.data_root == (str(run.photos),)
    assert (options.super_category, options.placeholder) == (("teddy bear",), ("<my-teddy>",))
    assert (options.max_steps, options.seed, options.crop, options.masks) == (20, 1, "center", None)
    run.masks.mkdir()
    assert parse_training_options(training_arguments(SETTINGS, run)).masks == (str(run.masks),)


def test_a_page_killed_before_it_knows_the_process_finds_it_again(queue: RunQueue, run: RunFolder) -> None:
    command = [sys.executable, "-c", SLEEPER.format(seconds=30), str(run.path)]
    run.write_process(None, 0.0, command)
    queue.enqueue(run)  # the page was killed between the start and the next two steps
    with subprocess.Popen(command) as child:
        deadline = time.monotonic() + 10
        while RunQueue(queue.root).process_of(run) is None:
            assert time.monotonic() < deadline
        assert queue.state(run) is RunState.RUNNING
        assert RunQueue(queue.root).start_next() is None
        assert run.queued_since is None  # or it would start once more
        child.kill()
    assert queue.state(run) is RunState.INTERRUPTED


def test_a_page_killed_before_the_start_starts_the_run_later(queue: RunQueue, run: RunFolder, sleeping: None) -> None:
    queue.enqueue(run)
    run.write_process(None, 0.0, ["never started"])
    other = RunQueue(queue.root)
    assert other.state(run) is RunState.WAITING
    assert other.start_next() == run
    other.stop(run)
    wait_for_end(other, run)


def test_a_finished_run_in_the_queue_does_not_start_again(queue: RunQueue, run: RunFolder, sleeping: None) -> None:
    queue.enqueue(run)
    run.write_process(0, 0.0, [])
    write_progress(run, 20, with_concept=True)
    assert queue.start_next() is None
