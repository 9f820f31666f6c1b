"""Digests of code: what does something counts, what says something does not."""
from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.paper import source_digest
from evaluation.paper.source_digest import GRADING, ROOT, TEACHING, code_of, meaning

PLAIN = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize("same", [
    '"""Of numbers."""\ndef double(x):\n    """Twice."""\n    # or x + x\n    return (2\n            * x)\n',
    "def double(x): return 2*x"])
def test_words_and_layout_do_not_count(same: str) -> None:
    assert meaning(same) == meaning(PLAIN)


@pytest.mark.parametrize("other", [PLAIN.replace("2", "3"), PLAIN.replace("x)", "x=1)"), f"{PLAIN}NAME = '''text'''\n"])
def test_whatever_does_something_counts(other: str) -> None:
    assert meaning(other) != meaning(PLAIN)


def test_a_body_of_words_alone_is_code_all_the_same() -> None:
    words = 'class A:\n    """Words."""\n    def b(self):\n        """More."""\n'
    assert meaning(words) != meaning("class A:\n    pass\n")


def test_the_files_are_there_each_once() -> None:
    every = [*TEACHING, *GRADING]
    assert len(set(every)) == len(every) and all((ROOT / file).is_file() for file in every)
    assert {"ldm/modules/rank_one.py", "ldm/models/diffusion/time_grid.py"} < set(TEACHING)


def test_a_change_in_any_of_them_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("a.py", "b.py")
    monkeypatch.setattr(source_digest, "ROOT", tmp_path)
    seen = []
    for contents in ((PLAIN, "B = 1"), ("# twice\n" + PLAIN, "B = 1  # one"), (PLAIN, "B = 2"), ("B = 2", PLAIN)):
        for name, content in zip(files, contents, strict=True):
            (tmp_path / name).write_text(content)
        code_of.cache_clear()
        seen.append(code_of(files))
    code_of.cache_clear()
    assert seen[0] == seen[1] and len(set(seen)) == 3
