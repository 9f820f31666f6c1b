"""The concepts that are loaded into pipelines of diffusers, with their settings, as the tensors that act."""
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.settings import override_settings, values_for_each
from ldm.concepts.stacking import gate_settings
from ldm.integrations.diffusers.processors import LayerEdit
from ldm.modules.edit import Edit

Values = float | Sequence[float | None] | Mapping[str, float]
TAGS = itertools.cycle(range(1, 251))  # exact in every floating-point type of 16 bits


class LoadedConcepts:
    """The concepts of one pipeline, or of several that share a U-Net. `load_concepts` returns it.

    Attributes:
        concepts: with their current settings, and their duals.
        global_locking: whether the keys of the whole prompt are locked to the super-categories.
        tag: number of this set of concepts; embeddings that were encoded with another set are refused.
        layer_edits: path of each layer in the U-Net of diffusers -> what the concepts add to it. The objects stay the
            same when settings change.
    """

    def __init__(self) -> None:
        self.concepts: list[Concept] = []
        self.global_locking = False
        self.tag = 0
        self.layer_edits: dict[str, LayerEdit] = {}
        self.stored: list[Concept] = []  # with the settings of their files
        self._layer_names: dict[str, str] = {}
        self._edits: dict[torch.device, Edit] = {}

    def __repr__(self) -> str:
        return f"LoadedConcepts({', '.join(f'{concept.placeholder}: {concept.summary}' for concept in self.concepts)})"

    @property
    def placeholders(self) -> list[str]:
        """The words that stand for the concepts in prompts."""
        return [concept.placeholder for concept in self.concepts]

    # Settings

    def set(self, bias: Values | None = None, temperature: Values | None = None, global_locking: bool | None = None,
            all_layers: bool | None = None) -> None:
        """Change how the concepts act from the next call on. What is None stays as it is.

        Args:
            bias: beta; one value for all concepts, one for each in order, or a mapping from placeholders to values.
                Higher follows the prompt more and the concept less.
            temperature: tau, likewise, above 0: how softly the gate opens.
            global_locking: lock the keys of the whole prompt to the super-categories.
            all_layers: use the learned target outputs of all layers; False: of those that each concept's file names.

        Raises:
            UserError: a value is not a number in its range, or belongs to no concept.
        """
        biases, temperatures = self._numbers("bias", bias), self._numbers("temperature", temperature)
        if any(value is not None and value <= 0 for value in temperatures or ()):
            raise UserError(f"temperature {temperature} must be above 0; 0.1 is usual")
        changed = override_settings(self.concepts, biases, temperatures, all_layers=bool(all_layers))
        if all_layers is False:
            changed = [replace(concept, used_layers=stored.used_layers)
                       for concept, stored in zip(changed, self.stored, strict=True)]
        self.global_locking = self.global_locking if global_locking is None else bool(global_locking)
        self._use(changed)

    def reset(self) -> None:
        """Return to the settings of the concepts' files."""
        self.global_locking = False
        self._use(self.stored)

    def _numbers(self, name: str, values: Any) -> tuple[float | None, ...] | None:
        each = values_for_each(values, self.concepts)
        for value in each or ():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not is_number:
                raise UserError(f"{name} {value!r} is not a number; give one, such as 0.6")
        return each

    # Tensors

    def extend(self, stored: Sequence[Concept], layer_names: Mapping[str, str]) -> None:
        """Add concepts. Those that are loaded keep their settings.

        Args:
            stored: all concepts, the loaded ones first, with the settings of their files and their duals.
            layer_names: path of each layer in the U-Net of diffusers -> its name in concept files.
        """
        self._layer_names = dict(layer_names)
        added = list(stored[len(self.stored):])
        self.stored = list(stored)
        if added:
            self.tag = next(TAGS)
            self._use([*self.concepts, *added])

    def edit(self, device: torch.device) -> Edit:
        """Return the concepts as tensors on a device, without target outputs."""
        if device not in self._edits:
            self._edits[device] = Edit(
                target_inputs=torch.stack([concept.target_input for concept in self.concepts]).float().to(device),
                duals=torch.stack([concept.dual for concept in self.concepts]).float().to(device),
                **gate_settings(self.concepts, device),
                target_outputs_v={},
                target_outputs_k={},
                projections=[concept.projection for concept in self.concepts],
            )
        return self._edits[device]

    def move_outputs(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move target outputs to where the U-Net computes."""
        for edit in self.layer_edits.values():
            edit.to(device, dtype)

    def _use(self, concepts: Sequence[Concept]) -> None:
        """Let these concepts act, with their settings."""
        self.concepts = list(concepts)
        self._edits.clear()
        super_inputs = torch.stack([concept.super_input for concept in concepts]).float()
        for path, name in self._layer_names.items():
            outputs_v = [concept.target_outputs_v.get(name) if concept.uses_layer(name) else None
                         for concept in concepts]
            outputs_k = [concept.target_outputs_k.get(name) for concept in concepts]
            unused = torch.tensor([output is None for output in outputs_v])
            edit = self.layer_edits.setdefault(path, LayerEdit())
            edit.outputs_v, edit.outputs_k = _stack(outputs_v), _stack(outputs_k)
            edit.inputs_v = super_inputs * unused[:, None] if unused.any() else None


def _stack(outputs: Sequence[Tensor | None]) -> Tensor | None:
    """Return (J, p), zero where there is no output; None if there is none at all."""
    present = [output for output in outputs if output is not None]
    if not present:
        return None
    return torch.stack([torch.zeros_like(present[0]) if output is None else output for output in outputs]).float()
