"""One training run of the page as a folder. Its files alone tell its state, so that no process has to remember it.

    run.json       `RunSettings`
    photos/        the accepted photos
    left_out/      photos that the user left out
    masks/         painted masks, one for each photo; absent: the segmenter makes them
    form.json      what the form said, before there is a run.json
    queued         the time from which the run waits for its turn
    process.json   process id, start time and command of the training process
    stopped        the user asked it to stop
    log.txt        what the process printed
    training/      the log folder of `main.py` is in here
"""
from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from functools import partial
from pathlib import Path

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError

SETTINGS, PHOTOS, LEFT_OUT, MASKS, QUEUED = "run.json", "photos", "left_out", "masks", "queued"
PROCESS, STOPPED, LOG, TRAINING = "process.json", "stopped", "log.txt", "training"
CONCEPT, PROGRESS = "concept.safetensors", "progress.jsonl"
LONGEST_TITLE = 60


class RunState(Enum):
    """The state of a run, in words for the page."""

    DRAFT = "not started"
    WAITING = "waiting for its turn"
    RUNNING = "training"
    FINISHED = "finished"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True)
class RunSettings:
    """What a run was asked to learn.

    Attributes:
        title: the name that the page shows.
        super_category: what kind of subject it is.
        placeholder: its word in prompts.
        config: config of the training, such as configs/perfusion.yaml.
        checkpoint: the base model; None: the config's.
        max_steps: training steps; None: the config's.
        seed: random seed; None: the config's.
        crop: "subject" or "center".
        overrides: "key=value" pairs that override the config.
        created: seconds since the epoch.
    """

    title: str
    super_category: str
    placeholder: str
    config: str
    checkpoint: str | None = None
    max_steps: int | None = None
    seed: int | None = None
    crop: str | None = None
    overrides: tuple[str, ...] = ()
    created: float = 0.0


@dataclass(frozen=True)
class RunFolder:
    """A run of the page.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's name, which identifies the run."""
        return self.path.name

    @property
    def photos(self) -> Path:
        return self.path / PHOTOS

    @property
    def masks(self) -> Path:
        return self.path / MASKS

    @property
    def left_out(self) -> Path:
        return self.path / LEFT_OUT

    @property
    def log_file(self) -> Path:
        return self.path / LOG

    def toggle_photo(self, name: str) -> None:
        """Move a photo out of training, or back if it was moved out.

        Raises:
            UserError: there is no such photo.
        """
        plain = Path(name).name
        used, unused = self.photos / plain, self.left_out / plain
        source, target = (used, unused) if used.is_file() else (unused, used)
        if not source.is_file():
            raise UserError(f"{plain}: this photo is gone; choose another one")
        target.parent.mkdir(exist_ok=True)
        shutil.move(source, target)

    # Settings

    def read_settings(self) -> RunSettings:
        """Return the settings.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            values = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            known = {field.name: values[field.name] for field in fields(RunSettings) if field.name in values}
            return RunSettings(**{**known, "overrides": tuple(known.get("overrides", ()))})
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{self.path}: holds no readable {SETTINGS}; delete this run") from None

    def write_settings(self, settings: RunSettings) -> None:
        _write_json(self.path / SETTINGS, asdict(settings))

    def rename(self, title: str) -> None:
        """Change the title that the page shows. The folder keeps its name.

        Raises:
            UserError: the title is empty or too long.
        """
        self.write_settings(replace(self.read_settings(), title=check_title(title)))

    # Results of `main.py`

    @property
    def training(self) -> Path | None:
        """The newest log folder of `main.py`, or None before it has begun."""
        folders = sorted(path for path in (self.path / TRAINING).glob("*") if path.is_dir())
        return folders[-1] if folders else None

    @property
    def concept(self) -> Path | None:
        """The learned concept's file, or None."""
        folder = self.training
        return folder / CONCEPT if folder is not None and (folder / CONCEPT).is_file() else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint from which training can go on, or None."""
        folder = self.training
        last = None if folder is None else folder / "checkpoints" / "last.ckpt"
        return last if last is not None and last.is_file() else None

    # State

    def write_process(self, pid: int | None, started: float, command: list[str]) -> None:
        """Store which process trains this run.

        Args:
            pid: its id; None: it is about to start, 0: it could not be started.
            started: the process's own start time; another process may get the same id later.
            command: what it runs.
        """
        _write_json(self.path / PROCESS, {"pid": pid, "started": started, "command": command})

    def read_process(self) -> dict[str, object] | None:
        """Return what `write_process` stored, or None."""
        try:
            stored = json.loads((self.path / PROCESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stored if isinstance(stored, dict) else None

    @property
    def queued_since(self) -> float | None:
        """The time from which it waits for its turn, or None."""
        try:
            return float((self.path / QUEUED).read_text())
        except (OSError, ValueError):
            return None

    def state(self, is_running: bool, finished_steps: int, max_steps: int) -> RunState:
        """Return the state of the run.

        Args:
            is_running: whether its process is alive.
            finished_steps: training steps taken.
            max_steps: steps that it is to take; 0 if unknown.
        """
        if is_running:
            return RunState.RUNNING
        if self.queued_since is not None:
            return RunState.WAITING
        if self.concept is not None and finished_steps >= max_steps:
            return RunState.FINISHED
        if (self.path / STOPPED).is_file():
            return RunState.STOPPED
        if self.read_process() is None:
            return RunState.DRAFT
        return RunState.FAILED if self.error() else RunState.INTERRUPTED

    def error(self) -> str:
        """Return the error that ended the training, in one line, or ""."""
        lines = [line for line in self.log_tail(20) if line.startswith("error: ")]
        return lines[-1].removeprefix("error: ") if lines else ""

    def log_tail(self, count: int) -> list[str]:
        """Return the last lines of the log."""
        try:
            text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return [line.rpartition("\r")[2] for line in text.splitlines()][-count:]


def check_title(title: str) -> str:
    """Return a title without surrounding and control characters.

    Raises:
        UserError: it is empty or too long.
    """
    cleaned = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", title).split())
    if not cleaned or len(cleaned) > LONGEST_TITLE:
        raise UserError(f"name: give one of 1 to {LONGEST_TITLE} characters")
    return cleaned


def _write_json(path: Path, values: dict[str, object]) -> None:
    text = json.dumps(values, indent=1)
    write_atomically(path, partial(_write_text, text=text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
