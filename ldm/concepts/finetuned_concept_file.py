"""The file format of concepts of methods other than Perfusion: load, save and check.

File format 1 (safetensors). Metadata key `personalization`, JSON:

    {"format_version": 1, "method": identifier of the method, "method_name": its readable name (optional),
     "concepts": [{"placeholder", "super_category", "steps", "base", "parameter_count", and optionally "base_name",
                   "base_samples"}, ...]}

Files of any method load, whether or not this version knows the method. Tensors of the concept at index n of that list:

    n.vectors           (k, width)  embeddings of the placeholder's k tokens
    n.inputs            (k, d)      encodings of those tokens, averaged over the training prompts; only if the method
                                    supports merging weights (Custom Diffusion)
    n.weights.<name>                weights that replace those of the base model's U-Net, by their names in it
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.concepts.file_tensors import WORD, find_invalid_numbers, split_by_index, tensors_to_store, tensors_under
from ldm.concepts.finetuned_concept import BUILT_IN_NAMES, FinetunedConcept, is_method_name, is_method_slug
from ldm.concepts.placeholders import is_placeholder

FORMAT_VERSION = 1
METADATA_KEY = "personalization"
SETTINGS = {"placeholder": str, "super_category": str, "steps": int, "base": str, "parameter_count": int}
BASE_TEXTS = ("base_name", "base_samples")  # optional settings
DAMAGED = "damaged; copy or train it again"


def save_finetuned_concepts(path: str | Path, concepts: Sequence[FinetunedConcept],
                            precision: torch.dtype | None = torch.float16) -> Path:
    """Write concepts of one method to one file. The file is complete or not written at all.

    Args:
        path: the file; an existing one is replaced.
        concepts: at least one.
        precision: as for `ldm.concepts.concept_file.save_perfusion_concepts`.

    Raises:
        UserError: the training of a concept diverged.
    """
    return save_tensors(path, *finetuned_contents(path, concepts, precision))


def finetuned_contents(path: str | Path, concepts: Sequence[FinetunedConcept], precision: torch.dtype | None
                       ) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors and the metadata of a file, checked. Arguments as for `save_finetuned_concepts`."""
    tensors = tensors_to_store(concepts, precision)
    _check_numbers(path, tensors)
    first = next((concept for concept in concepts if not concept.is_word), concepts[0])
    method, method_name = first.method, first.method_name
    header: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "method": method,
        "concepts": [_settings_of(concept) for concept in concepts],
    }
    # Files of the built-in methods stay as they were before files had names.
    if method_name and method_name != BUILT_IN_NAMES.get(method):
        header["method_name"] = method_name
    return tensors, {METADATA_KEY: header}


def _settings_of(concept: FinetunedConcept) -> dict[str, object]:
    optional = {name: getattr(concept, name) for name in BASE_TEXTS if getattr(concept, name)}
    return {name: getattr(concept, name) for name in SETTINGS} | optional


def load_finetuned_concepts(path: str | Path) -> list[FinetunedConcept]:
    """Load the concepts of a file, in its order, as float32 on the CPU.

    Raises:
        UserError: the file is missing, cut off, not a file of this format or from a later version of this project; or
            its contents are incomplete, inconsistent or not finite.
    """
    tensors, metadata = load_tensors(path)
    words = tensors_under(WORD, tensors)
    tensors = words or tensors

    # Read the header.
    header = metadata.get(METADATA_KEY)
    version = header.get("format_version") if isinstance(header, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION or not is_method_slug(header.get("method")):
        raise UserError(f"{path}: has a format or method that this version cannot read; update this project, or choose "
                        "another file")
    method_name = header.get("method_name", "")
    settings = header.get("concepts")
    valid = isinstance(settings, list) and settings and all(map(_are_settings, settings))
    if not valid or not is_method_name(method_name):
        raise UserError(f"{path}: its description of the concepts is {DAMAGED}")

    _check_numbers(path, tensors)
    by_index = split_by_index(tensors)
    concepts = []
    for index, values in enumerate(settings):
        own = {name: tensor.float() for name, tensor in by_index.get(str(index), {}).items()}
        concepts.append(_build_concept(Path(path), header["method"], method_name, values, own))
    return concepts


def _build_concept(path: Path, method: str, method_name: str, settings: Mapping[str, object],
                   tensors: Mapping[str, Tensor]) -> FinetunedConcept:
    """Return a concept from its settings and tensors.

    Raises:
        UserError: its vectors or inputs are missing or have the wrong shape.
    """
    vectors, inputs = tensors.get("vectors"), tensors.get("inputs", torch.zeros(0, 0))
    valid_vectors = vectors is not None and vectors.ndim == 2 and len(vectors) > 0
    if not valid_vectors or inputs.ndim != 2 or len(inputs) not in (0, len(vectors)):
        raise UserError(f"{path}: the word vectors of {settings['placeholder']} are {DAMAGED}")
    return FinetunedConcept(
        method=method,
        method_name=method_name,
        vectors=vectors,
        inputs=inputs,
        weights=tensors_under("weights.", tensors),
        source=str(path),
        **{name: settings[name] for name in SETTINGS},
        **{name: settings.get(name, "") for name in BASE_TEXTS},
    )


def _are_settings(values: object) -> bool:
    if not isinstance(values, dict):
        return False
    complete = all(isinstance(values.get(name), kind) for name, kind in SETTINGS.items())
    complete = complete and all(isinstance(values.get(name, ""), str) for name in BASE_TEXTS)
    return complete and is_placeholder(values["placeholder"])


def _check_numbers(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if a tensor is not of a floating-point type or not finite."""
    problem = find_invalid_numbers(tensors)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
