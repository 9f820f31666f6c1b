"""Child processes that can be ended together, and the processor time that each of them used."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ldm.common.errors import UserError

WINDOWS_TICKS = 1e7  # per second, of Windows' process times


class ProcessResult(NamedTuple):
    """A process that has ended.

    Attributes:
        returncode: its exit status.
        seconds: processor time, summed over all cores.
        errors: what it wrote to stderr.
    """

    returncode: int
    seconds: float
    errors: str


class ProcessGroup:
    """Child processes, started by any thread, that can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._is_stopped = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> ProcessResult:
        """Run a command to its end.

        Raises:
            UserError: if the group has been stopped; the process is not started then.
        """
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            # Whoever stops the group finds a process either not started, or among those that are running.
            with self._lock:
                if self._is_stopped:
                    raise UserError("stopped before it started; run the same command again to continue")
                process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=stderr)
                self._running.add(process)
            seconds = wait_for(process)
            with self._lock:
                self._running.discard(process)
            stderr.seek(0)
            return ProcessResult(process.returncode, seconds, stderr.read())

    def stop(self) -> None:
        """End all processes that are running, and start no others."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _end(process)


def wait_for(process: subprocess.Popen) -> float:
    """Wait for a process to end; return its processor time in seconds, summed over all cores."""
    if not hasattr(os, "wait4"):  # Windows
        process.wait()
        return _windows_seconds(process)
    # Unlike `resource`, this tells the time of a single child.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _end(process: subprocess.Popen) -> None:
    if not hasattr(os, "wait4"):
        process.terminate()
        return
    # Popen.terminate would collect the exit status that `wait_for` waits for.
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)


def _windows_seconds(process: subprocess.Popen) -> float:
    import ctypes
    from ctypes import wintypes

    created, exited, kernel, user = times = [wintypes.FILETIME() for _ in range(4)]
    ctypes.windll.kernel32.GetProcessTimes(int(process._handle), *map(ctypes.byref, times))
    return sum(((time.dwHighDateTime << 32) + time.dwLowDateTime) / WINDOWS_TICKS for time in (kernel, user))
