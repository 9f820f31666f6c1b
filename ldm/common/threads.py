"""Tell the threads of torch to sleep while they wait. Imports no torch, so that entry points can call it first."""
from __future__ import annotations

import os
import sys

# Every OpenMP runtime reads these variables once, when it is loaded: GNU's (torch on Linux), LLVM's (macOS) and Intel's
# (Windows). By default an idle thread spins for milliseconds before it sleeps. On a busy machine it spins away the
# processor time of the thread that it waits for. Sleeping at once costs time on an idle machine, where many short
# pieces of work follow each other. Spinning a thousand times first, which GNU's runtime can count, is a compromise for
# both (docs/performance.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
# The variables by which users choose how threads wait.
USER_CHOICES = (*WAITING, "KMP_BLOCKTIME", "KMP_LIBRARY")


def use_passive_waiting() -> None:
    """Let OpenMP's idle threads sleep soon, in this process and in those that it starts.

    Does nothing if the user has chosen how threads wait, or if torch is loaded already, since that is too late. The
    results of computations do not change.
    """
    if "torch" in sys.modules or any(name in os.environ for name in USER_CHOICES):
        return
    os.environ.update(WAITING)
