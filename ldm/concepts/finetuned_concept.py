"""What methods other than Perfusion learn, as a value: word vectors, and weights of the U-Net.

Textual Inversion, Custom Diffusion and DreamBooth are built in. A new method needs no entry here: a concept carries the
identifier of its method and, if it likes, a readable name. The file format is in `ldm.concepts.finetuned_concept_file`.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.concepts.concept import Concept, NamedConcept, usual_word_parts

METHOD_SLUG = re.compile(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*")
# Readable names of the methods whose files do not store one. New methods store theirs: do not add them here.
BUILT_IN_NAMES = {
    "textual-inversion": "Textual Inversion",
    "custom-diffusion": "Custom Diffusion",
    "dreambooth": "DreamBooth",
}


def is_method_slug(method: object) -> bool:
    """Return whether `method` can identify a method in files: lower-case words joined by "-", "_" or ".".

    "perfusion" is reserved: its concepts have a file format of their own.
    """
    return isinstance(method, str) and METHOD_SLUG.fullmatch(method) is not None and method != Concept.method


def is_method_name(name: object) -> bool:
    """Return whether `name` can be the readable name of a method: one line of text, or empty for none."""
    return isinstance(name, str) and name.isprintable() and name == name.strip()


@dataclass(eq=False)
class FinetunedConcept(NamedConcept):
    """What a method other than Perfusion learned about one subject.

    Attributes:
        method: identifier of the method, such as "textual-inversion" (see `is_method_slug`).
        placeholder: the word that stands for the concept in prompts, without white space.
        super_category: the kind of subject it is; may be several words.
        vectors: (k, width), the embeddings of the k tokens that the placeholder becomes in prompts.
        weights: name in the base model's U-Net -> weight that replaces it there; empty for Textual Inversion.
        inputs: (k, d), the encodings of the placeholder's tokens, averaged over the training prompts. They allow
            merging the weights of several concepts; (0, 0) if the method does not support that.
        parameter_count: number of trained parameters.
        steps: number of training steps.
        base: `base_fingerprint` of the base model it was trained on.
        base_name, base_samples: `BaseModel.name` and `BaseModel.samples` of that base model, or "".
        word_parts: as in `Concept`; not stored.
        source: the file it was loaded from, for messages; not stored.
        method_name: readable name of the method, such as "Textual Inversion"; "" uses a name made from `method`.

    Raises:
        ValueError: `method` or `method_name` has the wrong format.
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
    method_name: str = ""
    base_name: str = ""
    base_samples: str = ""
    word_parts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.word_parts:
            self.word_parts = usual_word_parts(self.vectors.shape[-1])
        if not is_method_slug(self.method):
            raise ValueError(f"method {self.method!r} must be lower-case words joined by hyphens, such as my-method")
        if not is_method_name(self.method_name):
            raise ValueError(f"method_name {self.method_name!r} must be one line of text")

    @property
    def method_label(self) -> str:
        """The readable name of the method: the stored one, a built-in one, or the identifier in title case."""
        in_title_case = re.sub(r"[-_.]", " ", self.method).title()
        return self.method_name or BUILT_IN_NAMES.get(self.method, in_title_case)

    @property
    def fits_any_base(self) -> bool:
        """Whether it is for any model of its width: word vectors alone, from a file that does not say its base."""
        return not self.base and not self.weights

    @property
    def context_width(self) -> int:
        """The width d of the encodings, of CLIP's and BERT's text towers also that of the word vectors."""
        return self.inputs.shape[1] if len(self.inputs) else self.vectors.shape[1]

    @property
    def word_vectors(self) -> Tensor:
        return self.vectors

    @property
    def is_word(self) -> bool:
        return not self.weights

    def fits_layers(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        by_weight = {f"{name}.{projection}.weight": shape for name, shape in layers.items()
                     for projection in ("to_k", "to_v")}
        return all(by_weight.get(name, shape) == shape for name, shape in self.base_shapes().items())

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    @property
    def summary(self) -> str:
        """How the concept was learned, for logs: "by DreamBooth"."""
        return f"by {self.method_label}"

    @property
    def has_mergeable_weights(self) -> bool:
        """Whether its weights can be merged with those of other concepts, or it has none.

        Merging (`ldm.concepts.weight_merging`) needs `inputs`, and weights (p, d) that read text encodings.
        """
        if len(self.inputs) == 0:
            return not self.weights
        width = self.inputs.shape[1]
        return all(weight.ndim == 2 and weight.shape[1] == width for weight in self.weights.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "vectors", self.vectors
        if len(self.inputs):
            yield "inputs", self.inputs
        for name, weight in self.weights.items():
            yield f"weights.{name}", weight


AnyConcept = Concept | FinetunedConcept
