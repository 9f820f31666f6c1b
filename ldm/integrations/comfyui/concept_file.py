"""Read concept files of Perfusion, with torch and safetensors alone.

This folder works without the rest of the project, so it reads the files on its own. The format is described in
`ldm/concepts/concept_file.py`; this module reads format 4, the first one that needs no covariance.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import PerfusionError

FORMAT = 4
METADATA_KEY = "perfusion"
TOWERS = ("clip_l", "clip_g", "clip_h")  # text encoders, in the order in which their encodings are concatenated
VALUES, KEYS = "target_output_v.", "target_output_k."
UPGRADE = "it lacks the dual vector; rewrite it once with merge_embeddings.py of the Perfusion project"


@dataclass(frozen=True, eq=False)
class Concept:
    """What Perfusion learned about one subject, with a text encoding of width d.

    Attributes:
        word: stands for the concept in prompts.
        super_category: the kind of subject it is, such as "teddy bear".
        vectors: name of each text encoder (see `TOWERS`) -> the learned word embedding, (width,).
        target_input: i*, (d,).
        super_input: i_super, (d,).
        dual: C^-1 i*, (d,).
        outputs_v: layer name -> o*_V, (p,), of the layers that the concept uses.
        outputs_k: layer name -> o*_K, (p,), if keys were trained; otherwise they are locked to the super-category.
        bias, temperature: beta and tau of the gate.
        projection: "full" or "gated".
        pooled: whose pooled encoding SDXL reads, "super_category" or "concept".
        source: the file's name, for messages.
    """

    word: str
    super_category: str
    vectors: dict[str, Tensor]
    target_input: Tensor
    super_input: Tensor
    dual: Tensor
    outputs_v: dict[str, Tensor]
    outputs_k: dict[str, Tensor]
    bias: float
    temperature: float
    projection: str
    pooled: str
    source: str

    @property
    def label(self) -> str:
        """The word and the file, for messages."""
        return f"{self.word} ({self.source})"

    @property
    def identity(self) -> str:
        """A text that no other concept has."""
        return f"{self.word} {hashlib.sha256(self.target_input.numpy().tobytes()).hexdigest()[:16]}"


def load_concepts(path: str | Path) -> list[Concept]:
    """Load the concepts of a file, as float32 on the CPU.

    Raises:
        PerfusionError: the file is missing, damaged, no concept, or of a format that lacks what this module needs.
    """
    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise PerfusionError(f"{name}: cannot be read ({error}); copy it again") from error
    if not isinstance(header, dict) or not isinstance(header.get("concepts"), list) or not header["concepts"]:
        raise PerfusionError(f"{name}: not a concept of Perfusion; LoRAs and embeddings have loaders of their own")
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT:
        raise PerfusionError(f"{name}: has concept format {version}, these nodes read up to {FORMAT}; update them")
    if version < FORMAT:
        raise PerfusionError(f"{name}: has concept format {version}: {UPGRADE}")

    # A file with one concept stores its word without an index, so that it is an embedding to ComfyUI as well.
    if len(header["concepts"]) == 1:
        tensors |= {f"0.{tower}": tensors.pop(tower) for tower in TOWERS if tower in tensors}
    return [_concept(name, settings, _under(f"{index}.", tensors)) for index, settings in enumerate(header["concepts"])]


def _concept(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Concept:
    """Return a concept from its settings and its tensors; `name` is that of the file."""
    word = settings.get("placeholder") if isinstance(settings, dict) else None
    if not isinstance(word, str) or word.split() != [word]:
        raise PerfusionError(f"{name}: the settings in it are damaged; copy it again")
    if "dual" not in tensors:
        raise PerfusionError(f"{name}: concept {word}: {UPGRADE}")
    used_layers = settings.get("used_layers") or None
    outputs_v = _under(VALUES, tensors)
    try:
        concept = Concept(
            word=word,
            super_category=str(settings["super_category"]),
            vectors={tower: tensors[tower].reshape(tensors[tower].shape[-1]) for tower in TOWERS if tower in tensors},
            target_input=tensors["target_input"],
            super_input=tensors["super_input"],
            dual=tensors["dual"],
            outputs_v={layer: outputs_v[layer] for layer in used_layers or outputs_v},
            outputs_k=_under(KEYS, tensors),
            bias=float(settings["bias"]),
            temperature=float(settings["temperature"]),
            projection=settings.get("projection", "full"),
            pooled=settings.get("pooled", "super_category"),
            source=name,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PerfusionError(f"{name}: concept {word} is incomplete ({error}); copy it again") from error
    problem = _problem(concept)
    if problem:
        raise PerfusionError(f"{name}: concept {word}: {problem}")
    return concept


def _problem(concept: Concept) -> str | None:
    """Return what is wrong with a concept and the remedy, or None."""
    if not concept.vectors:
        return f"it has no word for {' or '.join(TOWERS)}; these nodes take concepts of Stable Diffusion and SDXL"
    inputs = (concept.target_input, concept.super_input, concept.dual)
    if {tensor.shape for tensor in inputs} != {concept.dual.flatten().shape}:
        return "its directions do not fit together; copy it again"
    if not (math.isfinite(concept.bias) and math.isfinite(concept.temperature) and concept.temperature > 0):
        return f"its bias {concept.bias:g} and temperature {concept.temperature:g} are no gate; train it again"
    tensors = (*concept.vectors.values(), *inputs, *concept.outputs_v.values(), *concept.outputs_k.values())
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return "it holds numbers that are not finite; train it again"
    if not concept.dual @ concept.target_input > 0:
        return "its dual vector does not belong to its direction; train it again"
    return None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_words(concepts: Sequence[Concept]) -> None:
    """Raise PerfusionError if two concepts have the same word."""
    by_word: dict[str, Concept] = {}
    for concept in concepts:
        other = by_word.setdefault(concept.word.casefold(), concept)
        if other is not concept:
            raise PerfusionError(f"{other.label} and {concept.label} have the same word; give one of them another in "
                                 "the field \"word\" of its Load Perfusion Concept")
