"""Turn concepts into the `Edit` that they make together.

Keys and values of each layer get one target output per concept:

    values: o*_V as learned, or W_V i_super in layers that the concept does not use or has none for
    keys:   o*_K = W_K i_super (key-locking), unless the concept trained its own o*_K
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.modules.context import TextLayer
from ldm.modules.edit import Edit, project_inputs


def stack_concepts(concepts: Sequence[Concept], text_layers: Mapping[str, TextLayer]) -> Edit:
    """Return the edit that the concepts make together, in float32 on the device of the layers.

    For another bias or temperature, pass `dataclasses.replace(concept, bias=..., temperature=...)`.

    Args:
        concepts: at least one, trained on the base model of the layers (see `check_base`), with their duals (see
            `ldm.concepts.duals.add_duals`).
        text_layers: layer name -> layer, from `ldm.modules.attention.name_text_layers`.

    Raises:
        UserError: a concept has target outputs for other layers than these.
    """
    for concept in concepts:
        check_layers(concept, text_layers)
    super_inputs = torch.stack([concept.super_input for concept in concepts])

    # Values: o*_V where the concept uses the layer, else W_V i_super.
    learned_v = []
    for concept in concepts:
        outputs = concept.target_outputs_v
        learned_v.append({name: output for name, output in outputs.items() if concept.uses_layer(name)})
    values = _replace_rows(project_inputs(text_layers, super_inputs, "to_v"), learned_v)

    # Keys: o*_K where keys were trained, else locked to W_K i_super.
    learned_k = [concept.target_outputs_k for concept in concepts]
    keys = _replace_rows(project_inputs(text_layers, super_inputs, "to_k"), learned_k)

    device = next(iter(keys.values())).device
    return Edit(
        target_inputs=torch.stack([concept.target_input for concept in concepts]).float().to(device),
        duals=torch.stack([concept.dual for concept in concepts]).float().to(device),
        **gate_settings(concepts, device),
        target_outputs_v=values,
        target_outputs_k=keys,
        projections=[concept.projection for concept in concepts],
    )


def gate_settings(concepts: Sequence[Concept], device: torch.device) -> dict[str, Tensor]:
    """Return the `biases` and `temperatures` of an `Edit`, (J,) each."""
    return {
        "biases": torch.tensor([float(concept.bias) for concept in concepts], device=device),
        "temperatures": torch.tensor([float(concept.temperature) for concept in concepts], device=device),
    }


def check_layers(concept: Concept, text_layers: Mapping[str, TextLayer]) -> None:
    """Raise UserError if the target outputs of the concept do not match the layers by name and shape."""
    layers = {name: tuple(layer.to_v.weight.shape) for name, layer in text_layers.items()}
    mismatched = [name for name, shape in concept.base_shapes().items() if layers.get(name) != shape]
    if mismatched:
        raise UserError(f"concept {concept.label} does not fit this model: they differ in layer {min(mismatched)}; "
                        "train it again")


def _replace_rows(outputs: Mapping[str, Tensor], learned: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return `outputs` with row j of each layer replaced by what concept j learned there, if it learned any.

    Args:
        outputs: layer name -> (J, p).
        learned: for each of J concepts, layer name -> (p,).
    """
    replaced = {}
    for name, rows in outputs.items():
        indices = [index for index, concept in enumerate(learned) if name in concept]
        replaced[name] = rows.clone()
        if indices:  # one transfer to the device per layer
            replaced[name][indices] = torch.stack([learned[index][name] for index in indices]).to(rows)
    return replaced
