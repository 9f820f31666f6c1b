"""The same seed, config and machine give the same concept, however many threads add up its sums."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from teaching import BASE, NO_SEARCH, ROOT, state_of

from ldm.training.run import main as train

AS_TAUGHT = ("--max_steps", "12", "lightning.callbacks.pictures=null", NO_SEARCH)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.chdir(ROOT):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_two_threads_teach_the_same_concept_twice(two_threads: None, tmp_path: Path) -> None:
    """In full precision: a concept file, in 16 bits, would hide small differences."""
    states = []
    for name in ("first", "again"):
        train([*BASE, "-l", str(tmp_path / name), *AS_TAUGHT])
        (logdir,) = (tmp_path / name).iterdir()
        states.append(state_of(logdir)["state_dict"])
    first, again = states
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
