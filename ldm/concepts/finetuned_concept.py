"""What Textual Inversion, Custom Diffusion and DreamBooth learn, as a value: word vectors and weights of the U-Net.

File format 1 (safetensors). Metadata key `personalization`, JSON: {"format_version": 1, "method": one of `METHODS`,
"concepts": [{"placeholder", "super_category", "steps", "base", "parameter_count"}, ...]}. Tensors of the concept at
position n of that list:

    n.vectors           (k, width)  word embeddings of the placeholder's k tokens
    n.inputs            (k, d)      encodings of those tokens, averaged over the training prompts; only where several
                                    such concepts can be merged by them (Custom Diffusion)
    n.weights.<name>                weights that stand in for those of the base model's U-Net, by their names in it

Perfusion's own files are those of `ldm.concepts.concept`; `load_concepts` and `save_concepts` know both.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_metadata, load_tensors, save_tensors
from ldm.concepts.concept import (
    Concept,
    NamedConcept,
    find_invalid_numbers,
    is_placeholder,
    load_perfusion_concepts,
    save_perfusion_concepts,
    split_by_index,
    tensors_to_store,
)
from ldm.concepts.merging import rename_duplicates

FORMAT_VERSION = 1
METADATA_KEY = "personalization"
METHODS = {"textual-inversion": "Textual Inversion", "custom-diffusion": "Custom Diffusion", "dreambooth": "DreamBooth"}
SETTINGS = {"placeholder": str, "super_category": str, "steps": int, "base": str, "parameter_count": int}
DAMAGED = "damaged; copy or train it again"


@dataclass(eq=False)
class FinetunedConcept(NamedConcept):
    """What a method other than Perfusion learned about one thing.

    Attributes:
        method: one of `METHODS`.
        placeholder: the word that stands for it in prompts, without white space.
        super_category: what kind of thing it is; may be several words.
        vectors: (k, width): in prompts the placeholder is k tokens with these embeddings.
        weights: what stands in for weights of the base model's U-Net, by their names in it; none in Textual Inversion.
        inputs: (k, d): the encodings of its tokens, averaged over the training prompts; (0, 0) where nothing needs it.
        parameter_count: how many numbers training learned.
        steps: how many training steps it had.
        base: `base_fingerprint` of the model it was trained on.
        source: the file it was loaded from, for messages; not stored.
    """

    method: str
    placeholder: str
    super_category: str
    vectors: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    parameter_count: int = 0
    steps: int = 0
    base: str = ""
    source: str = ""

    @property
    def summary(self) -> str:
        """How it was learned, in a few words."""
        return f"by {METHODS[self.method]}"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "vectors", self.vectors
        if len(self.inputs):
            yield "inputs", self.inputs
        yield from ((f"weights.{name}", weight) for name, weight in self.weights.items())


AnyConcept = Concept | FinetunedConcept


def save_concepts(path: str | Path, concepts: Sequence[AnyConcept],
                 precision: torch.dtype | None = torch.float16) -> Path:
    """Writes concepts of one method, Perfusion or another, to one file, whole or not at all.

    `precision` as for `save_perfusion_concepts`.

    Raises:
        UserError: a concept whose training diverged.
    """
    if not isinstance(concepts[0], FinetunedConcept):
        return save_perfusion_concepts(path, concepts, precision)
    tensors = tensors_to_store(concepts, precision)
    _refuse_bad_numbers(path, tensors)
    settings = [{name: getattr(concept, name) for name in SETTINGS} for concept in concepts]
    return save_tensors(path, tensors, {METADATA_KEY: {
        "format_version": FORMAT_VERSION, "method": concepts[0].method, "concepts": settings}})


def load_concepts(path: str | Path) -> list[Concept] | list[FinetunedConcept]:
    """The concepts of a file of any method, in its order, as float32 on the CPU.

    Raises:
        UserError: as for `load_perfusion_concepts`.
    """
    return _load_tuned(Path(path)) if METADATA_KEY in load_metadata(path) else load_perfusion_concepts(path)


def _load_tuned(path: Path) -> list[FinetunedConcept]:
    tensors, metadata = load_tensors(path)
    header = metadata[METADATA_KEY]
    version = header.get("format_version") if isinstance(header, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION or header.get("method") not in list(METHODS):
        raise UserError(f"{path}: of a format or method that this version does not read; update it, or choose another "
                        "file")
    settings = header.get("concepts")
    if not isinstance(settings, list) or not settings or not all(map(_are_settings, settings)):
        raise UserError(f"{path}: what it says of its concepts is {DAMAGED}")
    _refuse_bad_numbers(path, tensors)
    of_each = split_by_index(tensors)
    return [_assembled(path, header["method"], values, of_each.get(str(n), {})) for n, values in enumerate(settings)]


def _are_settings(values: object) -> bool:
    return (isinstance(values, dict) and all(isinstance(values.get(name), kind) for name, kind in SETTINGS.items())
            and is_placeholder(values["placeholder"]))


def _assembled(path: Path, method: str, values: Mapping[str, object], stored: Mapping[str, Tensor]) -> FinetunedConcept:
    own = {name: tensor.float() for name, tensor in stored.items()}
    vectors, inputs = own.get("vectors"), own.get("inputs", torch.zeros(0, 0))
    if vectors is None or vectors.ndim != 2 or not len(vectors) or inputs.ndim != 2 or len(inputs) not in (
            0, len(vectors)):
        raise UserError(f"{path}: the word vectors of {values['placeholder']} are {DAMAGED}")
    weights = {name.removeprefix("weights."): weight for name, weight in own.items() if name.startswith("weights.")}
    return FinetunedConcept(method=method, vectors=vectors, inputs=inputs, weights=weights, source=str(path),
                        **{name: values[name] for name in SETTINGS})


def _refuse_bad_numbers(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    if problem := find_invalid_numbers(tensors):
        raise UserError(f"{path}: {problem}")


def merge_concepts(concepts: Sequence[AnyConcept], placeholders: Sequence[str] | None = None) -> list[AnyConcept]:
    """Concepts of one method that can be used together, renamed as `rename_duplicates` does.

    Raises:
        UserError: they are of different methods or base models, or several are of DreamBooth.
    """
    for concept in concepts[1:]:
        ours, theirs = _method(concepts[0]), _method(concept)
        if ours != theirs:
            raise UserError(f"{concepts[0].label} was learned by {ours}, {concept.label} by {theirs}; "
                            "only concepts of one method can be used together")
        if ours == METHODS["dreambooth"]:
            raise UserError(f"{concepts[0].label} and {concept.label}: DreamBooth changes the whole U-Net, so two of "
                            "its concepts cannot be used together; choose one")
    return rename_duplicates(concepts, placeholders)


def _method(concept: AnyConcept) -> str:
    return METHODS[concept.method] if isinstance(concept, FinetunedConcept) else "Perfusion"
