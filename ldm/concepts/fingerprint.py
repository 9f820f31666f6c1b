"""Identify the base model that a concept was trained on.

A concept works best with that model. With a fine-tune of it, which has the same layers, it works more or less. With a
model of another family it does not work at all.
"""
from __future__ import annotations

import base64
import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.families import family_of_width
from ldm.common.errors import UserError
from ldm.concepts.concept import NamedConcept
from ldm.modules.context import TextLayer

log = logging.getLogger(__name__)

SAMPLES_PER_WEIGHT = 8
ROUNDING = 2**-8  # relative; bfloat16, the coarsest precision of copies that count as the same model, rounds by half
SMALLEST = 1e-6  # numbers below are subnormal in float16
LEAST_COSINE = 0.5  # between the samples of a model and a fine-tune of it; 0 is expected of unrelated models
VAGUE_NAMES = ("model", "last", "diffusion_pytorch_model", "pytorch_model")


class Relation(Enum):
    """How two base models are related."""

    SAME = "the same weights, up to rounding"
    FINETUNED = "one is a fine-tune of the other, or both are of a third"
    UNRELATED = "trained separately"
    UNKNOWN = "not known"


class KnownBase(NamedTuple):
    """A base model that concept files need not describe.

    Attributes:
        name: for messages.
        samples: see `BaseModel`.
    """

    name: str
    samples: str


KNOWN_BASES = {  # by fingerprint
    "586fb01fd602e8643615ce0cafe74623edf089771a30d044b41342977447bbea": KnownBase(
        "the bundled mini model",
        "aKzYqV2qeqwSpw4ohKJDMiwlTqqMLDKvP62XkG+lFi2bIcysxKxlLYswwDBEruApBq8qoFko+SBJraMt4yZHKECnA6"
        "3eMPkrHqpxL2YukykCsJKqMyaEn2Cvw6zepzQshLF+MHmt0qucrBOqzK1trQcatiZYsCWk+6ooJYkm8qvAsMMoJjA2"
        "rwokTRVDJhikKaVuqVGobyc6LPmftSRnLB4t8CyQI+WkUzDYrQqsgJ2sqM8oKCkNLMMqGaH4IFwoLa9KIXoptyxJLi"
        "euCawiKYCkqqinmeMsMK2bG90sRjI="),
}


@dataclass(frozen=True)
class BaseModel:
    """What identifies a base model.

    Attributes:
        fingerprint: see `base_fingerprint`.
        name: of its checkpoint, or "".
        samples: some of the weights that the fingerprint is of, see `sample_weights`. They recognize the model in
            another precision, which has another fingerprint.
        layers: name of each cross-attention layer that reads text -> (p, d), the shape of its W_V.
    """

    fingerprint: str
    name: str = ""
    samples: str = ""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, text_layers: Mapping[str, TextLayer], checkpoint: str | Path | None = None, fingerprint: str = ""
           ) -> BaseModel:
        """Describe a model.

        Args:
            text_layers: layer name -> layer, from `ldm.modules.attention.name_text_layers`.
            checkpoint: where its weights come from, if known.
            fingerprint: that of the model before training; "" computes it.
        """
        shapes = {name: tuple(layer.to_v.weight.shape) for name, layer in text_layers.items()}
        return cls(fingerprint or base_fingerprint(text_layers), checkpoint_name(checkpoint),
                   sample_weights(text_layers), shapes)

    @property
    def label(self) -> str:
        """The model's name for messages, with the family that it belongs to."""
        width = next((shape[1] for shape in self.layers.values()), None)
        return _label(self.fingerprint, self.name, width)

    @property
    def stored(self) -> dict[str, str]:
        """What concept files store to identify the model."""
        if self.fingerprint in KNOWN_BASES:
            return {"base": self.fingerprint}
        return {"base": self.fingerprint, "base_name": self.name, "base_samples": self.samples}


def base_fingerprint(text_layers: Mapping[str, TextLayer]) -> str:
    """Return the SHA-256 of W_K and W_V of every cross-attention layer that reads text.

    These are the weights that a concept depends on. They are hashed as float16, so the fingerprint is the same on any
    device, and for the 16-bit and the 32-bit file of a model.

    Args:
        text_layers: layer name -> layer, from `ldm.modules.attention.name_text_layers`.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(text_layers):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def sample_weights(text_layers: Mapping[str, TextLayer]) -> str:
    """Return 8 evenly spaced numbers of each weight that `base_fingerprint` reads, as float16 in base64."""
    samples = []
    for _, weight in _weights(text_layers):
        flat = weight.flatten()
        indices = torch.linspace(0, len(flat) - 1, SAMPLES_PER_WEIGHT).long()
        samples.append(flat[indices.to(flat.device)].to("cpu", torch.float16))
    return base64.b64encode(torch.cat(samples).numpy().tobytes()).decode() if samples else ""


def check_base(concept: NamedConcept, base: BaseModel) -> None:
    """Check that a concept works with a base model.

    The model that it was trained on, in any precision, passes. Another one with the same layers, such as a fine-tune,
    causes one warning.

    Raises:
        UserError: the model has other layers, or weights that have nothing to do with the concept's model.
    """
    if concept.base == base.fingerprint or concept.fits_any_base:
        return
    relation = _compare(known_samples(concept), base.samples)
    if relation is Relation.UNRELATED or not concept.fits_layers(base.layers):
        raise UserError(f"concept {concept.label} was trained on {base_label(concept)}, and the loaded model is "
                        f"{base.label}, which is another model; load the model it was trained on, or train it again on "
                        "this one")
    if relation is not Relation.SAME:
        _warn_of_another_base(concept.label, base_label(concept), base.label)


def check_same_family(concept: NamedConcept, other: NamedConcept) -> None:
    """Raise UserError if two concepts cannot be of one family of base models."""
    relation = _compare(known_samples(concept), known_samples(other))
    of_one_base = concept.base == other.base or concept.fits_any_base or other.fits_any_base
    unrelated = not of_one_base and (relation is Relation.UNRELATED or concept.context_width != other.context_width)
    unrelated |= concept.word_vectors.shape[1] != other.word_vectors.shape[1]
    if unrelated or not _fit_together(concept.base_shapes(), other.base_shapes()):
        raise UserError(f"{concept.label} was trained on {base_label(concept)}, but {other.label} on "
                        f"{base_label(other)}; only concepts of one base model can be used together")


def same_base(concept: NamedConcept, other: NamedConcept) -> dict[str, str]:
    """Return how another concept names its base model, if that is this one's in another precision; otherwise nothing.

    So both can be saved to one file.
    """
    if concept.base == other.base or _compare(known_samples(concept), known_samples(other)) is not Relation.SAME:
        return {}
    return {"base": other.base, "base_name": other.base_name, "base_samples": other.base_samples}


def base_label(concept: NamedConcept) -> str:
    """Return the name of the base model that a concept was trained on, for messages."""
    return _label(concept.base, concept.base_name, concept.context_width)


def known_samples(concept: NamedConcept) -> str:
    """Return the samples of the base model that a concept was trained on; "" if they are unknown."""
    known = KNOWN_BASES.get(concept.base)
    return known.samples if known else concept.base_samples


def checkpoint_name(path: str | Path | None) -> str:
    """Return a name for the model of a checkpoint: that of the file, or of its folder if the file's says nothing."""
    if path is None:
        return ""
    path = Path(path)
    return path.resolve().parent.name if path.stem in VAGUE_NAMES else path.stem or path.name


def _fit_together(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> bool:
    return all(others.get(name, shape) == shape for name, shape in shapes.items())


def _weights(text_layers: Mapping[str, TextLayer]) -> list[tuple[str, Tensor]]:
    """Return W_K and W_V of all layers with their names, in the order of the layers' names."""
    return [(f"{name}.{projection}", getattr(text_layers[name], projection).weight.detach())
            for name in sorted(text_layers) for projection in ("to_k", "to_v")]


def _label(fingerprint: str, name: str, width: int | None) -> str:
    if fingerprint in KNOWN_BASES:
        return KNOWN_BASES[fingerprint].name
    family = "an unknown model" if width is None else family_of_width(width).name
    return f"{name}, {family}" if name else family


def _compare(samples: str, others: str) -> Relation:
    """Return how two models are related whose weights have these samples."""
    if not samples or not others:
        return Relation.UNKNOWN
    try:
        one, other = (np.frombuffer(base64.b64decode(text), np.float16).astype(float) for text in (samples, others))
    except ValueError:
        return Relation.UNKNOWN
    if len(one) != len(other):
        return Relation.UNRELATED
    tolerance = ROUNDING * np.maximum(abs(one), abs(other)) + SMALLEST
    if (abs(one - other) <= tolerance).all():
        return Relation.SAME
    cosine = one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), SMALLEST)
    return Relation.FINETUNED if cosine > LEAST_COSINE else Relation.UNRELATED


@functools.cache
def _warn_of_another_base(label: str, theirs: str, loaded: str) -> None:
    """Log the warning; cached, so that a run logs it once."""
    log.warning("warning: concept %s was taught on %s, and images are generated with %s; it may look less like its "
                "photos", label, theirs, loaded)
