"""OpenMP's threads sleep while they wait, in every entry point, unless the user has chosen otherwise."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.common.threads import USER_CHOICES, use_passive_waiting

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "evaluation").rglob("*.py")]
ENTRY_POINTS = sorted(str(path.relative_to(ROOT)) for path in SOURCES
                      if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
                      and path.name != "knn2img.py")  # which only says that it is left out
# Runs a script and reports the policy at the moment when torch is imported, or else at the end.
RUN = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            report()

def report():
    print("policy:", os.environ.get("OMP_WAIT_POLICY"))
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Watch)]
    report_at_end.clear()

report_at_end = [report]
sys.meta_path.insert(0, Watch())
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    for function in list(report_at_end):
        function()
"""


@pytest.fixture
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment and a process that know neither torch nor a choice of the user's."""
    for name in USER_CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.usefixtures("fresh_environment")
def test_threads_wait_passively_by_default() -> None:
    use_passive_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.usefixtures("fresh_environment")
@pytest.mark.parametrize("variable", USER_CHOICES)
def test_the_users_choice_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "7")
    use_passive_waiting()
    assert os.environ[variable] == "7"
    assert variable == "OMP_WAIT_POLICY" or "OMP_WAIT_POLICY" not in os.environ


def test_nothing_is_set_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USER_CHOICES:
        monkeypatch.delenv(name, raising=False)
    use_passive_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_every_entry_point_sets_the_policy_before_torch_and_knows_debug(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in USER_CHOICES}
    run = subprocess.run([sys.executable, "-c", RUN, script, "--debug", "--no-such-flag"], capture_output=True,
                         text=True, cwd=ROOT, env=environment, check=False)
    assert run.stdout.splitlines()[-1:] == ["policy: PASSIVE"], run.stdout + run.stderr
    assert run.returncode == 2
    *traceback, line = run.stderr.splitlines()
    assert traceback[0] == "Traceback (most recent call last):" and line.startswith("error: ")


def test_entry_points_are_found() -> None:
    assert {"main.py", "merge_embeddings.py", "scripts/txt2img.py", "evaluation/reproduce.py"} <= set(ENTRY_POINTS)
