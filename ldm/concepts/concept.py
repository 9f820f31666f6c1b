"""A learned concept as a value: `Concept` for Perfusion, and the base class that concepts of all methods share.

Symbols as in `ldm.modules.rank_one`. The file format is in `ldm.concepts.concept_file`.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor


class NamedConcept:
    """Base class of what a method learned about one subject.

    Attributes:
        method: identifier of the method in files, such as "perfusion".
        placeholder: the word that stands for the concept in prompts.
        super_category: the kind of subject it is, such as "teddy bear".
        base: `base_fingerprint` of the base model it was trained on.
        base_name, base_samples: `BaseModel.name` and `BaseModel.samples` of that model, or "".
        source: the file it was loaded from, for messages, or "".
    """

    method: str
    placeholder: str
    super_category: str
    base: str
    base_name: str
    base_samples: str
    source: str
    fits_any_base = False  # whether it also works with base models other than `base`

    @property
    def label(self) -> str:
        """The placeholder, followed by the file if there is one; identifies the concept in messages."""
        return f"{self.placeholder} ({self.source})" if self.source else self.placeholder

    @property
    def method_label(self) -> str:
        """The readable name of the method, for messages and figures."""
        raise NotImplementedError

    @property
    def context_width(self) -> int | None:
        """The width d of the text encodings of its base model, or None if the concept does not show it."""
        raise NotImplementedError

    @property
    def word_vectors(self) -> Tensor:
        """The embeddings of the tokens that the placeholder becomes, (k, width)."""
        raise NotImplementedError

    @property
    def is_word(self) -> bool:
        """Whether it is word vectors alone, which go together with concepts of any method."""
        return False

    def fits_layers(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether it can act on a U-Net.

        Args:
            layers: name of each cross-attention layer that reads text -> (p, d), the shape of its W_V.
        """
        raise NotImplementedError

    def base_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes that its base model determines, by the names of layers or weights."""
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name in a file, without the leading index of the concept."""
        raise NotImplementedError


SUPER_CATEGORY = "super_category"
POOLED = (SUPER_CATEGORY, "concept")
CLIP_L, CLIP_G, CLIP_H, BERT = "clip_l", "clip_g", "clip_h", "bert"  # text encoders, as ComfyUI calls them in files
USUAL_WORD_PARTS = {1024: {CLIP_H: 1024}, 1280: {BERT: 1280}, 2048: {CLIP_L: 768, CLIP_G: 1280}}  # by width


def usual_word_parts(width: int) -> dict[str, int]:
    """Return the `word_parts` of concepts from before files named them, for word embeddings of this width."""
    return dict(USUAL_WORD_PARTS.get(width, {CLIP_L: width}))


@dataclass(eq=False)
class Concept(NamedConcept):
    """What Perfusion learned about one subject.

    Attributes:
        placeholder: the word that stands for the concept in prompts, without white space.
        super_category: the kind of subject it is; may be several words.
        embedding: v, (1, width), the learned word embedding; width is that of the text encoder's word embeddings. With
            several text encoders it is the concatenation of a part for each, see `word_parts`.
        target_input: i*, (d,).
        super_input: i_super, (d,).
        target_outputs_v: layer name -> o*_V, (p,), for all layers or some; at least one. The others use W_V i_super.
        target_outputs_k: layer name -> o*_K, (p,), for the same layers if keys were trained; empty if they are locked.
        dual: C^-1 i*, (d,), with the C^-1 of training: all that the edit needs of C. None: unknown, as in files of
            older versions; it is then computed from the C of the model in use.
        word_parts: name of each text encoder's word vector in files -> its width, in the order of `embedding`. Empty:
            the usual ones for this width, see `usual_word_parts`.
        bias: beta, the threshold of the gate.
        temperature: tau, the softness of the gate; above 0.
        projection: one of `ldm.modules.rank_one.PROJECTIONS`.
        used_layers: names of the layers that use their learned o*_V in generation. The other layers use the
            super-category's output W_V i_super instead. Empty: all layers use theirs.
        pooled: what the pooled vector of a prompt is computed from, one of `POOLED`, with text encoders that have one
            (SDXL's). "super_category": the prompt with the super-category in the concept's place.
        steps: number of training steps.
        base: `base_fingerprint` of the base model it was trained on.
        target_energy: ||i*||^2 under the C^-1 used in training, to detect another C^-1 in generation where `dual` is
            None. None if unknown, as in files of older versions.
        base_name, base_samples: `BaseModel.name` and `BaseModel.samples` of that base model. "" if unknown, as in files
            of older versions, or if `base` says enough.
        date: the day it was learned, "2026-01-31", or "" if unknown.
        resolution: width and height of the images it was learned from, such as "512x512", or "".
        prediction_type: what its base model predicts, "epsilon" or "v", or "".
        thumbnail: a small image of it, see `ldm.concepts.thumbnail`, or "". A file of several concepts stores none.
        source: the file it was loaded from, for messages; not stored.
    """

    method: ClassVar[str] = "perfusion"
    method_label: ClassVar[str] = "Perfusion"

    placeholder: str
    super_category: str
    embedding: Tensor
    target_input: Tensor
    super_input: Tensor
    target_outputs_v: dict[str, Tensor]
    target_outputs_k: dict[str, Tensor] = field(default_factory=dict)
    dual: Tensor | None = None
    word_parts: dict[str, int] = field(default_factory=dict)
    bias: float = 0.75
    temperature: float = 0.1
    projection: str = "full"
    used_layers: list[str] = field(default_factory=list)
    pooled: str = SUPER_CATEGORY
    steps: int = 0
    base: str = ""
    target_energy: float | None = None
    source: str = ""
    base_name: str = ""
    base_samples: str = ""
    date: str = ""
    resolution: str = ""
    prediction_type: str = ""
    thumbnail: str = ""

    def __post_init__(self) -> None:
        if not self.word_parts:
            self.word_parts = usual_word_parts(self.embedding.shape[-1])

    @property
    def summary(self) -> str:
        """The settings in a few words, for logs: "bias 0.75, temperature 0.1, 3 of 16 layers"."""
        gated = ", gated projection" if self.projection == "gated" else ""
        used = f", {len(self.used_layers)} of {len(self.target_outputs_v)} layers" if self.used_layers else ""
        return f"bias {self.bias:g}, temperature {self.temperature:g}{gated}{used}"

    @property
    def parameter_count(self) -> int:
        """The number of trained parameters: those of v and of the target outputs."""
        outputs = (*self.target_outputs_v.values(), *self.target_outputs_k.values())
        return self.embedding.numel() + sum(output.numel() for output in outputs)

    @property
    def context_width(self) -> int:
        return len(self.target_input)

    @property
    def word_vectors(self) -> Tensor:
        return self.embedding

    def fits_layers(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        return all(layers.get(name) == shape for name, shape in self.base_shapes().items())

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (len(output), self.context_width) for name, output in self.target_outputs_v.items()}

    def uses_layer(self, layer_name: str) -> bool:
        """Return whether generation uses the learned o*_V of this layer."""
        return not self.used_layers or layer_name in self.used_layers

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts = self.embedding.split(list(self.word_parts.values()), -1)
        yield from zip(self.word_parts, parts, strict=True)
        yield "target_input", self.target_input
        yield "super_input", self.super_input
        if self.dual is not None:
            yield "dual", self.dual
        for layer, output in self.target_outputs_v.items():
            yield f"target_output_v.{layer}", output
        for layer, output in self.target_outputs_k.items():
            yield f"target_output_k.{layer}", output
