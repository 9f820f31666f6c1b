"""Tell the threads of torch to sleep while they wait. Imports no torch, so that entry points can call it first."""
from __future__ import annotations

import os
import sys

# Every OpenMP runtime reads OMP_WAIT_POLICY once, when it is loaded: GNU's (torch on Linux), LLVM's (macOS) and
# Intel's (Windows). By default an idle thread spins before it sleeps. On a busy machine it spins away the processor
# time of the thread that it waits for.
WAIT_POLICY = "OMP_WAIT_POLICY"
# The variables by which users choose how threads wait; each takes precedence over the policy that is set here.
USER_CHOICES = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def use_passive_waiting() -> None:
    """Let OpenMP's idle threads sleep at once, in this process and in those that it starts.

    Does nothing if the user has chosen how threads wait, or if torch is loaded already, since that is too late. The
    results of computations do not change.
    """
    if "torch" in sys.modules or any(name in os.environ for name in USER_CHOICES):
        return
    os.environ[WAIT_POLICY] = "PASSIVE"
