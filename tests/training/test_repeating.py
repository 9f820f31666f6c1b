"""The same seed, config and machine give the same concept, also with several threads."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.training_setup import load_state, train_main

SETTINGS = ("--max_steps", 12, "lightning.callbacks.previews=null")


@pytest.mark.slow
def test_two_threads_learn_the_same_concept_twice(tmp_path: Path) -> None:
    """Compare in full precision: a concept file, in 16 bits, would hide small differences."""
    first, again = (load_state(train_main(tmp_path / name, *SETTINGS, threads=2))["state_dict"] for name in ("a", "b"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
