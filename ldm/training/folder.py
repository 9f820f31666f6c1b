"""The folder that a training run writes to: made late, taken away again where nothing was learned."""
from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ldm.checkpoints.pickled import UNREADABLE
from ldm.errors import UserError

STATE = ("state_dict", "optimizer_states", "global_step", "pytorch-lightning_version")


@contextlib.contextmanager
def removed_on_failure(folder: Path, begun: Callable[[], bool]) -> Iterator[None]:
    """Makes `folder`; where what follows fails before `begun()`, removes it and the parents made along with it.

    A folder that was there before stays as it is.

    Raises:
        UserError: it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--logdir: {folder} cannot be made ({error.strerror}); choose another place") from None
    try:
        yield
    except BaseException:
        if folder in made and not begun():
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made[1:]:
                with contextlib.suppress(OSError):  # another run has written there since
                    parent.rmdir()
        raise


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
