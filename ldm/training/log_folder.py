"""The folder that a training run writes to: made late, taken away again where nothing was learned."""
from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path

import torch

from ldm.checkpoints.pickled import UNREADABLE
from ldm.common.errors import UserError

STATE = ("state_dict", "optimizer_states", "global_step", "pytorch-lightning_version")


@contextlib.contextmanager
def folder_for(wanted: Path, begun: Callable[[], bool]) -> Iterator[Path]:
    """A folder of this run alone: `wanted`, or where another run has that already, `wanted`-2 and so on.

    Where the end comes before `begun()`, it is removed, with the parents that were made along with it.

    Raises:
        UserError: it cannot be made.
    """
    parents = [path for path in wanted.parents if not path.exists()]
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
        folder = next(filter(_is_new, chain([wanted], numbered)))
    except OSError as error:
        raise UserError(f"--logdir: {wanted} cannot be made ({error.strerror}); choose another place") from None
    try:
        yield folder
    finally:
        if not begun():
            shutil.rmtree(folder, ignore_errors=True)
            for parent in parents:
                with contextlib.suppress(OSError):  # another run has written there since
                    parent.rmdir()


def _is_new(folder: Path) -> bool:
    """Makes it, unless there is one: in a single step, as another run may begin at the same time."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def steps_taken(path: Path) -> int:
    """How many steps a checkpoint's run has taken; runs nothing that the file contains.

    Raises:
        UserError: it is no whole checkpoint of a training run.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is strange about a file that is no checkpoint
            state = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, *UNREADABLE):
        raise UserError(f"--resume {path}: cut off or no checkpoint; name another one of the run's checkpoints/, "
                        "or train anew") from None
    if not isinstance(state, dict) or any(name not in state for name in STATE):
        raise UserError(f"--resume {path}: holds no state of a training run; to start from weights use --actual_resume")
    return int(state["global_step"])
