from __future__ import annotations

import subprocess
import sys

import pytest

from ldm.common.errors import UserError, one_line_errors


def test_a_users_mistake_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main(name: str) -> None:
        raise UserError(f"{name}: no such file")

    with pytest.raises(SystemExit) as left:
        main("a.ckpt")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: a.ckpt: no such file\n"


@pytest.mark.parametrize(("error", "status", "said"), [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"), (MemoryError(), 2, "memory is too short"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "memory is too short"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "memory is too short")])
def test_what_no_program_can_help_is_one_line_too(error: BaseException, status: int, said: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr().err
    assert left.value.code == status and told.startswith(f"error: {said}") and told.count("\n") == 1


def test_other_errors_stay_as_they_are() -> None:
    @one_line_errors
    def main() -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        main()
    assert main.__name__ == "main"


def test_no_error_no_exit() -> None:
    seen: list[int] = []
    one_line_errors(seen.append)(3)
    assert seen == [3]


def test_what_libraries_note_by_the_way_is_not_told() -> None:
    """In a process of its own, as a user starts one: what is told is set up once."""
    program = """
import logging
from ldm.common.errors import one_line_errors

@one_line_errors
def main():
    for name in ("matplotlib.font_manager", "ldm.training.run", "__main__"):
        logging.getLogger(name).info("noted by %s", name)
        logging.getLogger(name).warning("warned by %s", name)

main()
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == ""
    assert told.stderr.splitlines() == [
        "warned by matplotlib.font_manager", "noted by ldm.training.run", "warned by ldm.training.run",
        "noted by __main__", "warned by __main__"]
