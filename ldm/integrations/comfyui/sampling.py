"""Let all prompts of an image share the concepts that one of them names.

The negative prompt must go through the same edit as the prompt: then guidance amplifies the difference between the
prompts, and not that between an edited and an unedited layer. ComfyUI encodes prompts one by one, so each one is edited
by the concepts that it names itself, and the others are added here, when a sampling run shows all of its prompts.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .concept_file import Concept
from .edit import RELINK, Layout, pack
from .errors import PerfusionError

ENTRY = "perfusion"  # of a conditioning: its concepts, with the settings that it was encoded with
CONTEXT, CONTROL_CONTEXT = "cross_attn", "cross_attn_controlnet"  # ComfyUI's entries: for the U-Net, for ControlNets


class SharedEdit:
    """A wrapper of sampling runs that gives all prompts of a run the same concepts.

    Args:
        concepts: those of the model, in the order of the gates.
    """

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = list(concepts)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        conds = [cond for of_kind in executor.class_obj.conds.values() for cond in of_kind]
        share_concepts(conds, self.concepts)
        return executor(*args, **kwargs)


@dataclass(frozen=True)
class _Settings:
    """What edits the prompts of a run.

    Attributes:
        concepts: all J, with the biases and temperatures to use.
        acting: indices of those that some prompt names.
        global_locking: whether prompts that name none take their keys from their encoding.
    """

    concepts: list[Concept]
    acting: list[int]
    global_locking: bool


def share_concepts(conds: Sequence[dict[str, Any]], concepts: Sequence[Concept]) -> None:
    """Edit each prompt of a sampling run by all concepts that one of them names.

    Prompts that name a concept keep their settings; the others get those of the first prompt that names it. Without any
    such prompt, encodings become plain again. ControlNets get plain encodings in any case.

    Args:
        conds: conditionings of the run, in ComfyUI's form for samplers; changed in place.
        concepts: those of the model.

    Raises:
        PerfusionError: a prompt was encoded with other concepts.
    """
    layout = Layout(len(concepts[0].target_input), len(concepts))
    conds = [cond for cond in conds if cond.get(CONTEXT) is not None]
    identities = [concept.identity for concept in concepts]
    for cond in conds:
        if cond[CONTEXT].shape[-1] not in (layout.width, layout.packed_width):
            raise PerfusionError(layout.wrong_width(cond[CONTEXT]))
        if [concept.identity for concept in cond.get(ENTRY, concepts)] != identities:
            raise PerfusionError(f"the prompt was encoded with other concepts than the model has; {RELINK}")
        # ControlNets would read what the U-Net reads, which may be packed soon.
        given = cond.get(CONTROL_CONTEXT)
        cond[CONTROL_CONTEXT] = layout.encoding(cond[CONTEXT] if given is None else given)
    settings = _settings_of(conds, concepts, layout)
    for cond in conds:
        cond[CONTEXT] = _edited(cond[CONTEXT], cond.get(ENTRY, settings.concepts), settings, layout)


def _settings_of(conds: Sequence[dict[str, Any]], concepts: Sequence[Concept], layout: Layout) -> _Settings:
    """Return the concepts that act on at least one prompt, with the settings of the first prompt that names them."""
    chosen, global_locking = {}, False
    for cond in conds:
        if cond[CONTEXT].shape[-1] == layout.width:
            continue
        for index in layout.acting(cond[CONTEXT]):
            if not chosen:
                global_locking = _is_locked_globally(cond[CONTEXT], layout)
            chosen.setdefault(index, cond.get(ENTRY, concepts)[index])
    return _Settings([chosen.get(index, concept) for index, concept in enumerate(concepts)], sorted(chosen),
                     global_locking)


def _edited(context: Tensor, own_concepts: Sequence[Concept], settings: _Settings, layout: Layout) -> Tensor:
    """Return a prompt under the edit of all concepts that act, with its own settings of those that it names."""
    encoding = layout.encoding(context)
    if not settings.acting:
        return encoding
    own = layout.acting(context) if context.shape[-1] == layout.packed_width else []
    if own == settings.acting:
        return context
    if own:
        super_encoding = layout.keys(context)[0] if _is_locked_globally(context, layout) else None
    else:
        super_encoding = encoding if settings.global_locking else None
    concepts = [own_concepts[index] if index in own else concept for index, concept in enumerate(settings.concepts)]
    return pack(encoding, concepts, settings.acting, super_encoding)


def _is_locked_globally(packed: Tensor, layout: Layout) -> bool:
    """Return whether the keys of a packed prompt, which names a concept, come from the super-categories' prompt."""
    _, gates = layout.keys(packed)
    return not bool(torch.any(gates))
