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


@dataclass(eq=False)
class Concept(NamedConcept):
    """What Perfusion learned about one subject.

    Attributes:
        placeholder: the word that stands for the concept in prompts, without white space.
        super_category: the kind of subject it is; may be several words.
        embedding: v, (1, width), the learned word embedding; width is that of the text encoder's word embeddings.
        target_input: i*, (d,).
        super_input: i_super, (d,).
        target_outputs_v: layer name -> o*_V, (p,).
        target_outputs_k: layer name -> o*_K, (p,), if keys were trained; empty if they are locked.
        bias: beta, the threshold of the gate.
        temperature: tau, the softness of the gate; above 0.
        projection: one of `ldm.modules.rank_one.PROJECTIONS`.
        used_layers: names of the layers that use their learned o*_V in generation. The other layers use the
            super-category's output W_V i_super instead. Empty: all layers use theirs.
        steps: number of training steps.
        base: `base_fingerprint` of the base model it was trained on.
        target_energy: ||i*||^2 under the C^-1 used in training, to detect another C^-1 in generation. None if unknown,
            as in files of older versions.
        base_name, base_samples: `BaseModel.name` and `BaseModel.samples` of that base model. "" if unknown, as in files
            of older versions, or if `base` says enough.
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
    bias: float = 0.75
    temperature: float = 0.1
    projection: str = "full"
    used_layers: list[str] = field(default_factory=list)
    steps: int = 0
    base: str = ""
    target_energy: float | None = None
    source: str = ""
    base_name: str = ""
    base_samples: str = ""

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

    def fits_layers(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        return all(layers.get(name) == shape for name, shape in self.base_shapes().items())

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (len(output), self.context_width) for name, output in self.target_outputs_v.items()}

    def uses_layer(self, layer_name: str) -> bool:
        """Return whether generation uses the learned o*_V of this layer."""
        return not self.used_layers or layer_name in self.used_layers

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "embedding", self.embedding
        yield "target_input", self.target_input
        yield "super_input", self.super_input
        for layer, output in self.target_outputs_v.items():
            yield f"target_output_v.{layer}", output
        for layer, output in self.target_outputs_k.items():
            yield f"target_output_k.{layer}", output
