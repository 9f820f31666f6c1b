"""The folder that a training run writes to, and the checkpoint that it resumes from."""
from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from ldm.checkpoints.header import read_header
from ldm.common.errors import UserError
from ldm.common.paths import check_folder, user_path
from ldm.training.early_checks import OTHER_CHECKPOINT, check_resume_file, check_run_state
from ldm.training.options import TrainingOptions


@dataclass(frozen=True)
class ResumePoint:
    """The point from which a run continues.

    Attributes:
        folder: the run's log folder.
        checkpoint: the checkpoint file.
        steps: steps taken so far.
        configs: the config files of the run, oldest first.
    """

    folder: Path
    checkpoint: Path
    steps: int
    configs: tuple[str, ...]


def find_resume_point(given: str) -> ResumePoint:
    """Return where to continue the run of a log folder or of a checkpoint in one.

    Raises:
        UserError: there is no such run, or its checkpoint cannot be used.
    """
    path = user_path(given)
    if not path.exists():
        raise UserError(f"--resume {path}: no such log folder or checkpoint")
    folder = path if path.is_dir() else path.parent.parent
    checkpoint = folder / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise UserError(f"--resume {path}: there is no checkpoint {checkpoint} to go on from")
    configs = tuple(map(str, sorted(folder.glob("configs/*.yaml"))))
    return ResumePoint(folder, checkpoint, steps_taken(checkpoint), configs)


def new_log_folder(options: TrainingOptions, now: str) -> Path:
    """Return the path of a new log folder, `<logdir>/<now>_<name>`. Creates nothing.

    Raises:
        UserError: the name is not the name of a folder, or `logdir` cannot be written to.
    """
    name = (options.name or Path(options.configs[-1]).stem) + options.postfix
    if Path(name).name != name:
        raise UserError(f"--name {name}: names a folder in --logdir; leave out everything else")
    check_folder("--logdir", Path(options.logdir))
    return user_path(options.logdir) / f"{now}_{name}"


@contextlib.contextmanager
def log_folder(preferred: Path, has_started: Callable[[], bool]) -> Iterator[Path]:
    """Create a folder for this run alone: `preferred` or, if another run has that already, `preferred`-2 and so on.

    If the run ends before `has_started()`, the folder is removed, with the parents that were created along with it.

    Raises:
        UserError: it cannot be created.
    """
    parents = [path for path in preferred.parents if not path.exists()]
    try:
        preferred.parent.mkdir(parents=True, exist_ok=True)
        numbered = (preferred.with_name(f"{preferred.name}-{number}") for number in count(2))
        folder = next(filter(_create, chain([preferred], numbered)))
    except OSError as error:
        raise UserError(f"--logdir: {preferred} cannot be created ({error.strerror}); choose another place") from None
    try:
        yield folder
    finally:
        if not has_started():
            shutil.rmtree(folder, ignore_errors=True)
            for parent in parents:
                with contextlib.suppress(OSError):  # another run has written there since
                    parent.rmdir()


def _create(folder: Path) -> bool:
    """Create a folder unless it exists, in a single step: another run may start at the same time."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def steps_taken(path: Path) -> int:
    """Return how many steps the run of a checkpoint has taken. Executes nothing that the file contains.

    Raises:
        UserError: the file is not a complete checkpoint of a training run.
    """
    check_resume_file(str(path))
    header = read_header(path)
    state = None if header is None else header.content
    if not isinstance(state, Mapping):
        raise UserError(f"--resume {path}: cut off or no checkpoint; {OTHER_CHECKPOINT}")
    check_run_state(path, state)
    return state["global_step"]
