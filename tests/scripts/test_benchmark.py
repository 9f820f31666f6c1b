"""The benchmark runs, prints a row per measurement and keeps them; what it prints is not judged."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


def test_scenes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "scenes", "--rounds", "1", "--outdir", str(tmp_path)],
                          capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"].split(",")[0] for row in rows] == ["scenes"] * 3
    assert all(row["value"] > 10 for row in rows)
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [row["what"] for row in rows]


def test_a_part_that_does_not_exist(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "speed", "--outdir", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode != 0 and "there is no part 'speed'" in done.stderr and "Traceback" not in done.stderr
