"""A concept in training: where its target outputs start, and what checkpoints contain."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.concepts.trainable_concept import TrainableConcept


def make_layers() -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(to_k=nn.Linear(4, width, bias=False), to_v=nn.Linear(4, width, bias=False))
            for name, width in (("inner", 6), ("outer", 5))}


@pytest.mark.parametrize(("locking", "tables"), [("local", "v"), ("trained", "vk")])
def test_checkpoints_contain_what_is_trained(locking: str, tables: str) -> None:
    concept = TrainableConcept(torch.randn(1, 3), torch.randn(4), make_layers(), locking)
    outputs = {f"target_outputs_{table}.{index}" for table in tables for index in range(2)}
    assert set(concept.state_dict()) == {"embedding", "super_input", "target_input"} | outputs
    assert {name for name, _ in concept.named_parameters()} == {"embedding"} | outputs
    assert len(concept.values()) == len(outputs)


@pytest.mark.parametrize("locking", ["local", "trained"])
def test_target_outputs_start_at_those_of_the_super_category(locking: str) -> None:
    text_layers, super_input = make_layers(), torch.randn(4)
    concept = TrainableConcept(torch.randn(1, 3), super_input, text_layers, locking)
    edit = concept.edit(0.75, 0.1, torch.eye(4))
    for name, layer in text_layers.items():
        torch.testing.assert_close(edit.target_outputs_v[name], layer.to_v(super_input)[None])
        torch.testing.assert_close(edit.target_outputs_k[name], layer.to_k(super_input)[None])
        assert edit.target_outputs_v[name].requires_grad
        assert edit.target_outputs_k[name].requires_grad == (locking == "trained")


def test_values_start_at_another_encoding_in_trained_layers_only() -> None:
    text_layers, super_input, encoding = make_layers(), torch.randn(4), torch.randn(4)
    concept = TrainableConcept(torch.randn(1, 3), super_input, text_layers, trained_layers=["outer"])
    concept.start_values_at(encoding, text_layers)
    edit = concept.edit(0.75, 0.1, torch.eye(4))
    starts = {"inner": super_input, "outer": encoding}
    for name, layer in text_layers.items():
        torch.testing.assert_close(edit.target_outputs_v[name], layer.to_v(starts[name])[None])
        torch.testing.assert_close(edit.target_outputs_k[name], layer.to_k(super_input)[None])
    assert torch.equal(concept.target_input, super_input)


def test_an_unknown_locking_is_refused() -> None:
    with pytest.raises(ValueError, match="'global' is not one of local, trained"):
        TrainableConcept(torch.randn(1, 3), torch.randn(4), make_layers(), "global")
