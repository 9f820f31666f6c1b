"""Duals: missing ones come from C^-1, which nobody asks for otherwise; a wrong covariance is refused."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.concept_values import WIDTH, make_concept, randn
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.duals import add_duals, add_duals_of
from ldm.modules.covariance_files import save_covariance


def make_covariance() -> Tensor:
    sample = randn(50, WIDTH, seed=5)
    return sample.T @ sample / 50


def test_only_missing_duals_are_computed() -> None:
    stored, older = make_concept("<a>"), make_concept("<b>", seed=9, dual=None)

    def not_needed() -> Tensor:
        raise AssertionError("the covariance is not needed")

    assert add_duals([stored], not_needed) == [stored] and add_duals([], not_needed) == []
    inverse = torch.linalg.inv(make_covariance().double())
    first, second = add_duals([older, stored], lambda: inverse.float())
    assert second is stored and older.dual is None
    torch.testing.assert_close(first.dual.double(), inverse @ older.target_input.double(), rtol=1e-5, atol=1e-5)


def test_a_covariance_file_gives_duals_if_it_is_that_of_training(tmp_path: Path) -> None:
    path = save_covariance(tmp_path / "c.safetensors", make_covariance(), source="", captions=1, tokens="", encoder="")
    older, stored = make_concept("<a>", dual=None), make_concept("<b>", seed=9)
    (completed, same) = add_duals_of(path, [older, stored])
    assert same is stored
    energy = float(completed.dual @ completed.target_input)
    (again,) = add_duals_of(path, [replace(older, target_energy=1.01 * energy)])
    assert torch.equal(again.dual, completed.dual)
    for concept, message in (
        (replace(older, target_energy=2 * energy), r"<a> was trained with .* was .* and would be"),
        (replace(older, target_input=randn(5)), "of encodings of 6 numbers, those of <a> have 5"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            add_duals_of(path, [stored, concept])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        add_duals_of(tmp_path / "none.safetensors", [older])
