from __future__ import annotations

import subprocess
import sys

import pytest

from ldm.common.errors import DEBUG_VARIABLE, UserError, one_line_errors, show_tracebacks, tracebacks_shown


@pytest.fixture(autouse=True)
def without_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "0")


def test_a_user_error_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main(name: str) -> None:
        raise UserError(f"{name}: no such file")

    with pytest.raises(SystemExit) as left:
        main("a.ckpt")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: a.ckpt: no such file\n"


@pytest.mark.parametrize(("error", "status", "beginning"), [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"), (MemoryError(), 2, "out of memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory")])
def test_ctrl_c_and_too_little_memory_are_one_line_too(error: BaseException, status: int, beginning: str,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr().err
    assert left.value.code == status and printed.startswith(f"error: {beginning}") and printed.count("\n") == 1


@pytest.mark.parametrize("error", [UserError("a.ckpt: no such file"), KeyboardInterrupt(), MemoryError()])
def test_the_traceback_precedes_the_line_on_request(error: BaseException, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main() -> None:
        raise error

    show_tracebacks()
    with pytest.raises(SystemExit):
        main()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):" and last.startswith("error: ")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_environment_variable_for_tracebacks(value: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFUSION_DEBUG", value)
    assert tracebacks_shown() == shown
    monkeypatch.delenv("PERFUSION_DEBUG")
    assert not tracebacks_shown()


def test_other_errors_stay_as_they_are() -> None:
    @one_line_errors
    def main() -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        main()
    assert main.__name__ == "main"


def test_without_an_error_nothing_exits() -> None:
    seen: list[int] = []
    one_line_errors(seen.append)(3)
    assert seen == [3]


def test_log_messages_of_libraries_are_hidden() -> None:
    """In a process of its own, since logging is set up only once."""
    program = """
import logging
from ldm.common.errors import one_line_errors

@one_line_errors
def main():
    for name in ("matplotlib.font_manager", "ldm.training.run", "__main__"):
        logging.getLogger(name).info("info of %s", name)
        logging.getLogger(name).warning("warning of %s", name)

main()
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout == ""
    assert output.stderr.splitlines() == [
        "warning of matplotlib.font_manager", "info of ldm.training.run", "warning of ldm.training.run",
        "info of __main__", "warning of __main__"]
