"""Stacked concepts make the edit that each of them stands for."""
from __future__ import annotations

import pytest
import torch
from helpers.concept_values import FIRST, MIDDLE, WIDTH, make_concept, make_text_layers, randn

from ldm.common.errors import UserError
from ldm.concepts.stacking import stack_concepts
from ldm.modules.context import PromptContext


def test_keys_are_locked_to_the_super_category_unless_they_were_trained() -> None:
    layers = make_text_layers()
    locked = make_concept("<a>", bias=1, temperature=1)
    trained = make_concept("<b>", seed=9, trained_keys=True, bias=0.6)
    edit = stack_concepts([locked, trained], layers)
    assert edit.target_inputs.dtype == torch.float32
    torch.testing.assert_close(edit.target_inputs, torch.stack([locked.target_input, trained.target_input]))
    torch.testing.assert_close(edit.biases, torch.tensor([1.0, 0.6]))
    torch.testing.assert_close(edit.temperatures, torch.tensor([1.0, 0.1]))
    for name, layer in layers.items():
        torch.testing.assert_close(edit.target_outputs_k[name][0], layer.to_k.weight.detach() @ locked.super_input)
        assert torch.equal(edit.target_outputs_k[name][1], trained.target_outputs_k[name])
        assert torch.equal(edit.target_outputs_v[name][1], trained.target_outputs_v[name])
    context = edit.context(randn(2, 3, WIDTH))
    assert isinstance(context, PromptContext)
    assert context.concept_count == 2


def test_unused_layers_have_the_values_of_the_super_category() -> None:
    layers = make_text_layers()
    some, every = make_concept("<a>", used_layers=[MIDDLE]), make_concept("<b>", seed=9)
    edit = stack_concepts([some, every], layers)
    plain = layers[FIRST].to_v.weight.detach() @ some.super_input
    torch.testing.assert_close(edit.target_outputs_v[FIRST][0], plain)
    assert not torch.allclose(plain, some.target_outputs_v[FIRST])
    assert torch.equal(edit.target_outputs_v[MIDDLE][0], some.target_outputs_v[MIDDLE])
    for name in layers:
        assert torch.equal(edit.target_outputs_v[name][1], every.target_outputs_v[name])
    assert some.summary.endswith(", 1 of 2 layers") and "layers" not in every.summary


def test_layers_without_target_outputs_have_those_of_the_super_category() -> None:
    """Concepts with unequal sets of layers act together."""
    layers = make_text_layers()
    first, middle = make_concept("<a>", trained_keys=True), make_concept("<b>", seed=9)
    for concept, layer in ((first, MIDDLE), (middle, FIRST)):
        concept.target_outputs_v.pop(layer)
        concept.target_outputs_k.pop(layer, None)
    edit = stack_concepts([first, middle], layers)
    for name, weights in layers.items():
        for index, concept in enumerate((first, middle)):
            plain = weights.to_v.weight.detach() @ concept.super_input
            expected = concept.target_outputs_v.get(name, plain)
            torch.testing.assert_close(edit.target_outputs_v[name][index], expected)
            locked = weights.to_k.weight.detach() @ concept.super_input
            torch.testing.assert_close(edit.target_outputs_k[name][index], concept.target_outputs_k.get(name, locked))


def test_a_concept_with_other_layers_than_the_model_is_refused() -> None:
    layers = make_text_layers()
    layers.pop(MIDDLE)
    with pytest.raises(UserError, match="<bear>.*middle_block.1.attn2"):
        stack_concepts([make_concept()], layers)
    wider = make_concept(target_input=randn(7), super_input=randn(7), dual=randn(7))
    with pytest.raises(UserError, match="<bear>.*input_blocks.1.1.attn2"):
        stack_concepts([wider], make_text_layers())
