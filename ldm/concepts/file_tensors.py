"""What both concept file formats share: the tensors of concept n are named `n.<name>`.

See `ldm.concepts.concept_file` and `ldm.concepts.finetuned_concept_file` for the formats.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.concepts.concept import NamedConcept

DUAL = "dual"  # C^-1 i* of a `Concept`; C^-1 is ill-conditioned, so 16 bits are too few
WORD = "word."  # before the names of tensors of words, in a file of Perfusion's concepts
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # smaller ones support no arithmetic


def tensors_to_store(concepts: Sequence[NamedConcept], precision: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of all concepts under their names in a file.

    Args:
        concepts: in the order of the file.
        precision: the dtype to store; None: the one that `lossless_precision` chooses. Duals are stored in float32.
    """
    tensors, duals = {}, {}
    for index, concept in enumerate(concepts):
        for name, tensor in concept.tensors():
            (duals if name == DUAL else tensors)[f"{index}.{name}"] = tensor.detach().cpu()
    precision = lossless_precision(tensors.values()) if precision is None else precision
    stored = {name: tensor.to(precision) for name, tensor in tensors.items()}
    return stored | {name: dual.float() for name, dual in duals.items()}


def lossless_precision(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return float16 if it represents every number exactly, else float32."""
    exact = all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in tensors)
    return torch.float16 if exact else torch.float32


def split_by_index(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the index of their concept, and strip it from their names: `{"0": {"embedding": ...}}`.

    One pass over all tensors keeps files of thousands of concepts fast.
    """
    by_index: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        index, _, name = full_name.partition(".")
        by_index.setdefault(index, {})[name] = tensor
    return by_index


def tensors_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def find_invalid_numbers(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the numbers of a concept file and the remedy, or None if they are valid."""
    for name, tensor in tensors.items():
        if tensor.dtype not in SUPPORTED_DTYPES:
            return f"{name} holds {tensor.dtype} instead of floating-point numbers; copy or train it again"
        if not tensor.isfinite().all():
            return f"{name} holds numbers that are not finite: training diverged; train with lower learning rates"
    return None
