"""All runs of the page, of which one trains at a time, as `main.py` in a process of its own.

The process goes on if the page ends, and the page finds it again when it is started anew.
"""
from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT, quote_command
from ldm.web.run_folder import LOG, MASKS, PHOTOS, QUEUED, SETTINGS, STOPPED, TRAINING, RunFolder, RunSettings, RunState
from ldm.web.run_progress import read_progress

log = logging.getLogger(__name__)

SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")
LOCK = ".queue.lock"
POLL_SECONDS = 1.0
SECONDS_TO_STOP = 30.0  # for the last previews and files, before the process is ended


class RunQueue:
    """The runs in a folder.

    Args:
        root: the folder; created if it is missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._children: dict[int, subprocess.Popen] = {}
        self._ended = threading.Event()

    # The runs

    def runs(self) -> list[RunFolder]:
        """Return all runs, newest first."""
        folders = [path for path in self.root.iterdir() if path.is_dir() and SAFE_NAME.fullmatch(path.name)]
        return [RunFolder(path) for path in sorted(folders, key=lambda path: path.name, reverse=True)]

    def prepared_runs(self) -> list[RunFolder]:
        """Return the runs that have settings, newest first: all but drafts."""
        return [run for run in self.runs() if (run.path / SETTINGS).exists()]

    def run(self, name: str) -> RunFolder:
        """Return the run of that name.

        Raises:
            UserError: there is none.
        """
        path = self.root / name
        if not SAFE_NAME.fullmatch(name) or not path.is_dir():
            raise UserError("this run is gone; choose another one")
        return RunFolder(path)

    def create(self) -> RunFolder:
        """Create the folder of a new run."""
        while True:
            path = self.root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            (path / PHOTOS).mkdir()
            return RunFolder(path)

    def state(self, run: RunFolder) -> RunState:
        """Return the state of a run."""
        progress = read_progress(run)
        return run.state(self.process_of(run) is not None, progress.step, progress.steps)

    def delete(self, run: RunFolder) -> None:
        """Delete a run with all its files.

        Raises:
            UserError: it is training.
        """
        if self.process_of(run) is not None:
            raise UserError("this run is training; stop it first")
        shutil.rmtree(run.path, ignore_errors=True)

    # The queue

    def enqueue(self, run: RunFolder) -> None:
        """Let a run wait for its turn: a new one, or one that stopped and goes on.

        Raises:
            UserError: it is training, or has finished.
        """
        state = self.state(run)
        if state in (RunState.RUNNING, RunState.FINISHED):
            raise UserError(f"this run is {state.value}; start a new one instead")
        (run.path / STOPPED).unlink(missing_ok=True)
        if state is not RunState.WAITING:
            (run.path / QUEUED).write_text(str(time.time()))

    def stop(self, run: RunFolder) -> None:
        """Take a run from the queue, or end its training. What it has learned so far is saved."""
        (run.path / STOPPED).touch()
        (run.path / QUEUED).unlink(missing_ok=True)
        process = self.process_of(run)
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        threading.Thread(target=_end_after, args=(process, SECONDS_TO_STOP), daemon=True).start()

    def start_next(self) -> RunFolder | None:
        """Start the run that has waited longest, if none is training; return it."""
        try:
            with FileLock(self.root / LOCK, timeout=0):  # another page may serve the same folder
                running = [run for run in self.runs() if self.process_of(run) is not None]
                for run in running:  # the page may have been killed just after the start
                    (run.path / QUEUED).unlink(missing_ok=True)
                waiting = [run for run in self.runs() if run.queued_since is not None and not _is_finished(run)]
                if running or not waiting:
                    return None
                chosen = min(waiting, key=lambda run: run.queued_since or 0.0)
                self._start(chosen)
                return chosen
        except Timeout:
            return None

    def serve(self) -> None:
        """Start waiting runs, in a thread of its own, until `close`."""
        threading.Thread(target=self._serve, daemon=True, name="run queue").start()

    def close(self) -> None:
        """Start no more runs. A run in training goes on."""
        self._ended.set()

    def _serve(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                self.start_next()
            except (OSError, UserError) as error:
                log.warning("a run could not be started: %s", error)

    def _start(self, run: RunFolder) -> None:
        """Start the training of a run. If the page is killed in between, the run waits still, or is found again."""
        try:
            command = training_command(run)
        except UserError as error:
            run.log_file.write_text(f"error: {error}\n", encoding="utf-8")
            run.write_process(0, 0.0, [])
            (run.path / QUEUED).unlink(missing_ok=True)
            return
        run.write_process(None, 0.0, command)
        with (run.path / LOG).open("w", encoding="utf-8") as output:
            child = subprocess.Popen(command, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, stdout=output,
                                     stderr=subprocess.STDOUT, start_new_session=True,
                                     preexec_fn=_heed_interrupts if os.name == "posix" else None,
                                     env={**os.environ, "PYTHONUNBUFFERED": "1"})
        self._children[child.pid] = child
        run.write_process(child.pid, psutil.Process(child.pid).create_time(), command)
        (run.path / QUEUED).unlink(missing_ok=True)

    def process_of(self, run: RunFolder) -> psutil.Process | None:
        """Return the live process that trains a run, or None."""
        stored = run.read_process()
        if not stored or stored.get("pid") == 0:
            return None
        if stored.get("pid") is None:
            return find_process(stored.get("command"))
        child = self._children.get(stored["pid"])
        if child is not None and child.poll() is not None:  # reaps it
            return None
        try:
            process = psutil.Process(stored["pid"])
            is_same = abs(process.create_time() - float(stored["started"])) < 1
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, TypeError, ValueError):
            return None


def _is_finished(run: RunFolder) -> bool:
    progress = read_progress(run)
    return run.concept is not None and progress.step >= progress.steps


def find_process(command: object) -> psutil.Process | None:
    """Return the live process that runs a command, or None."""
    if not command:
        return None
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["cmdline"] == command and process.info["status"] != psutil.STATUS_ZOMBIE:
            return process
    return None


def training_command(run: RunFolder) -> list[str]:
    """Return the command that trains a run, or continues it from its last checkpoint.

    Raises:
        UserError: the run's settings are damaged.
    """
    python, main = sys.executable, str(PROJECT_ROOT / "main.py")
    if run.checkpoint is not None:
        return [python, main, "--resume", str(run.training)]
    return [python, main, *training_arguments(run.read_settings(), run)]


def training_arguments(settings: RunSettings, run: RunFolder) -> list[str]:
    """Return the arguments of `main.py` for a new run."""
    arguments = ["--base", settings.config, "--data_root", str(run.photos), "--init_word", settings.super_category,
                 "--placeholder", settings.placeholder, "--logdir", str(run.path / TRAINING), "--name", "concept"]
    if (run.path / MASKS).is_dir():
        arguments += ["--masks", str(run.path / MASKS)]
    optional = {"--actual_resume": settings.checkpoint, "--max_steps": settings.max_steps, "--seed": settings.seed,
                "--crop": settings.crop}
    for flag, value in optional.items():
        if value is not None:
            arguments += [flag, str(value)]
    progress = "lightning.callbacks.progress.target=ldm.training.progress_file.ProgressFile"
    return [*arguments, progress, *settings.overrides]


def shown_command(arguments: Sequence[str]) -> str:
    """Return the command that does the same in a terminal."""
    return f"python main.py {quote_command(*arguments)}"


def _heed_interrupts() -> None:
    """Let a child process be interrupted, also if the page itself was started in the background and ignores that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end_after(process: psutil.Process, seconds: float) -> None:
    """End a process that has not ended by itself in that time."""
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        process.kill()
    except psutil.Error:
        pass
