"""A page in a process of its own, as users start it."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"the page is at (http://[\d.:]+)")
SECONDS_TO_START = 120  # of a busy machine; an idle one takes 6


@dataclass
class PageProcess:
    """A page that is being served.

    Attributes:
        process: its process.
        address: where it is.
        runs: folder of its runs.
        log: file of what it prints.
    """

    process: subprocess.Popen
    address: str
    runs: Path
    log: Path

    @classmethod
    def start(cls, runs: Path) -> PageProcess:
        """Start the page on a free port and wait until it is served."""
        log = runs.parent / f"page-{time.monotonic_ns()}.log"
        command = [sys.executable, str(ROOT / "scripts" / "web.py"), "--runs", str(runs), "--port", "0"]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + SECONDS_TO_START
        while not (found := ADDRESS.search(log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return cls(process, found[1], runs, log)

    def kill(self) -> None:
        """End the page without giving it a chance to tidy up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
