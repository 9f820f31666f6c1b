"""Replace the settings of concepts for one run: bias, temperature and used layers."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept


def override_settings(concepts: Sequence[AnyConcept], biases: Sequence[float | None] | None = None,
                      temperatures: Sequence[float | None] | None = None, all_layers: bool = False
                      ) -> list[AnyConcept]:
    """Return copies of the concepts with other settings. The given concepts are not modified.

    Args:
        concepts: concepts of any method; only Perfusion's have these settings.
        biases: beta, one value for all concepts or one for each; None in the list keeps a concept's own.
        temperatures: tau, likewise.
        all_layers: use the learned target outputs of all layers, whatever the concepts' `used_layers` are.

    Raises:
        UserError: the number of values is wrong, or a concept does not have the setting.
    """
    changed = list(concepts)
    if biases is not None:
        changed = _replace_setting(changed, "bias", biases, flag="--bias")
    if temperatures is not None:
        changed = _replace_setting(changed, "temperature", temperatures, flag="--temperature")
    if all_layers:
        changed = _replace_setting(changed, "used_layers", [[]], flag="--all_layers")
    return changed


def values_for_each(values: Any, concepts: Sequence[AnyConcept]) -> Any:
    """Return values as a tuple; a mapping from placeholders becomes one value for each concept, None for the others.

    Raises:
        UserError: a placeholder is that of no concept.
    """
    if values is None or isinstance(values, tuple):
        return values
    if not isinstance(values, Mapping):
        return tuple(values) if isinstance(values, list) else (values,)
    by_word = {fold_word(word): value for word, value in values.items()}
    words = [fold_word(concept.placeholder) for concept in concepts]
    for word in by_word:
        if word not in words:
            raise UserError(f"no loaded concept is called {word}; loaded are {', '.join(words) or 'none'}")
    return tuple(by_word.get(word) for word in words)


def _replace_setting(concepts: Sequence[AnyConcept], name: str, values: Sequence[object], flag: str
                     ) -> list[AnyConcept]:
    """Return copies of the concepts with attribute `name` set to the one value, or to one value each."""
    having = [concept for concept in concepts if not isinstance(concept, FinetunedConcept)]
    without = next((concept for concept in concepts if isinstance(concept, FinetunedConcept)), None)
    if without is not None and not (having and without.is_word):
        raise UserError(f"{flag}: concept {without.label} was learned {without.summary} and has none; "
                        "leave the flag out")
    if len(values) == len(concepts) > len(having):  # None at the index of each word, which has no such setting
        values = [value for concept, value in zip(concepts, values, strict=True)
                  if concept in having or value is not None]
    if len(values) not in (1, len(having)):
        raise UserError(f"{len(values)} values of {name} for {len(having)} concepts; give one, or one each")
    one_each = iter(values if len(values) == len(having) else [values[0]] * len(having))
    changed = []
    for concept in concepts:
        value = next(one_each) if concept in having else None
        changed.append(concept if value is None else replace(concept, **{name: value}))
    return changed
