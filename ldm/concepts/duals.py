"""Give concepts from older files their dual vectors C^-1 i*, which new files store. Symbols as in `rank_one`."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.modules.covariance_files import load_covariance
from ldm.modules.rank_one import dual_vectors, invert_covariance

ENERGY_TOLERANCE = 0.02  # relative to ||i*||^2; 16-bit files change that of the mini model's concepts by at most 0.003


def add_duals(concepts: Sequence[Concept], inverse_covariance: Callable[[], Tensor]) -> list[Concept]:
    """Return the concepts, copies with a dual in place of those that have none. They are not modified.

    Args:
        concepts: any number of one base model.
        inverse_covariance: returns C^-1 of its text encoder, (d, d); called only if a dual is missing, since it may
            take long.
    """
    missing = [index for index, concept in enumerate(concepts) if concept.dual is None]
    completed = list(concepts)
    if missing:
        inverse = inverse_covariance()
        target_inputs = torch.stack([concepts[index].target_input for index in missing]).to(inverse.device)
        for index, dual in zip(missing, dual_vectors(target_inputs.float(), inverse).cpu(), strict=True):
            completed[index] = replace(concepts[index], dual=dual)
    return completed


def add_duals_of(path: str | Path, concepts: Sequence[Concept]) -> list[Concept]:
    """Return the concepts, copies with the dual under a file's covariance in place of those that have none.

    Raises:
        UserError: the file holds no covariance, or not the one that a concept was trained with.
    """
    covariance = load_covariance(path)
    missing = [concept for concept in concepts if concept.dual is None]
    for concept in missing:
        if concept.context_width != len(covariance):
            raise UserError(f"--covariance {path}: is of encodings of {len(covariance)} numbers, those of "
                            f"{concept.label} have {concept.context_width}; give the covariance of its base model")
    added = add_duals(missing, lambda: invert_covariance(covariance))
    for concept, energy in energy_mismatches(added):
        raise UserError(f"--covariance {path}: is not the one that {concept.label} was trained with (||i*||^2 was "
                        f"{concept.target_energy:.4g} and would be {energy:.4g}); give that of its training run")
    completed = iter(added)
    return [next(completed) if concept.dual is None else concept for concept in concepts]


def energy_mismatches(concepts: Sequence[Concept]) -> Iterator[tuple[Concept, float]]:
    """Yield each concept whose dual is not of the C of its training, which ||i*||^2 reveals, with its dual . i*.

    Args:
        concepts: with their duals.
    """
    for concept in concepts:
        energy, trained = float(concept.target_input.double() @ concept.dual.double()), concept.target_energy
        if trained is not None and not abs(energy - trained) <= ENERGY_TOLERANCE * trained:
            yield concept, energy
