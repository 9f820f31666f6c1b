"""Processes that are ended together, and their processor time on systems with and without wait4."""
from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from evaluation.paper.processes import ProcessGroup, wait_for
from ldm.common.errors import UserError


def test_a_result_has_status_time_and_errors() -> None:
    result = ProcessGroup().run([sys.executable, "-c", "import sys; print('out'); sys.exit('failed')"], os.environ)
    assert (result.returncode, result.errors) == (1, "failed\n") and 0 < result.seconds < 10


def test_a_stopped_group_starts_nothing(tmp_path: pytest.TempPathFactory) -> None:
    group = ProcessGroup()
    group.stop()
    with pytest.raises(UserError, match="stopped before it started"):
        group.run([sys.executable, "-c", f"open({str(tmp_path / 'started')!r}, 'w')"], os.environ)
    assert not (tmp_path / "started").exists()


def test_stopping_ends_all_processes() -> None:
    group, results = ProcessGroup(), []
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    threads = [threading.Thread(target=lambda: results.append(group.run(command, os.environ))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(group._running) < 2:
        time.sleep(0.01)
    group.stop()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2 and all(result.returncode != 0 for result in results)


def test_without_wait4_times_come_from_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_process_times(handle: int, *pointers: object) -> None:
        assert handle == 42
        for pointer, (high, low) in zip(pointers, ((0, 0), (0, 0), (0, 15_000_000), (1, 5_000_000)), strict=True):
            pointer._obj.dwHighDateTime, pointer._obj.dwLowDateTime = high, low

    monkeypatch.delattr(os, "wait4", raising=False)
    kernel32 = SimpleNamespace(GetProcessTimes=get_process_times)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process._handle = 42
    assert wait_for(process) == pytest.approx(2.0 + 2**32 / 1e7)
    assert process.returncode == 3


def test_without_wait4_a_group_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "wait4", raising=False)
    monkeypatch.setattr("evaluation.paper.processes._windows_seconds", lambda process: 1.0)
    group, results = ProcessGroup(), []
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    thread = threading.Thread(target=lambda: results.append(group.run(command, os.environ)))
    thread.start()
    while not group._running:
        time.sleep(0.01)
    group.stop()
    thread.join(60)
    assert results[0].returncode != 0 and results[0].seconds == 1.0
