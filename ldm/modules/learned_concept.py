"""The numbers of one concept while they are being learned."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.modules.concept import Concept
from ldm.modules.context import Edit, TextLayer, locked_keys, outputs_of

LOCKINGS = ("local", "trained")
FAINTEST_AXIS = 1e-6  # of the variance along the longest one


def axes_of(covariance: Tensor) -> Tensor:
    """(d, r): principal axes A of C (d, d), each as long as the standard deviation along it, so that A A^T = C.

    Those with hardly any are left out.
    """
    variances, axes = torch.linalg.eigh(covariance.to("cpu").double())
    kept = variances > FAINTEST_AXIS * variances[-1]
    return (axes[:, kept] * variances[kept].sqrt()).float()


class FreeOutputs(nn.ParameterList):
    """Target outputs of one concept, (1, p) for each layer, each learned by itself from where it starts."""

    def __init__(self, starts: Iterable[Tensor]) -> None:
        super().__init__(start.detach().clone() for start in starts)

    def outputs(self) -> list[Tensor]:
        """The target outputs as they now are."""
        return list(self)


class OutputsAlongAxes(nn.ParameterList):
    """Target outputs of one concept, (1, p) for each layer, o* = start + A z with the same z (1, r) for all layers.

    Only z is learned. An optimiser like Adam, which takes steps of about the same length in each number, so moves
    outputs along each axis as far as it is long, and nowhere else.

    Args:
        starts: where they start.
        axes: A of each layer, (p, r).
    """

    def __init__(self, starts: Iterable[Tensor], axes: Sequence[Tensor]) -> None:
        super().__init__([axes[0].new_zeros(1, axes[0].shape[1])])
        self.layers = len(axes)
        for place, (start, axis) in enumerate(zip(starts, axes, strict=True)):
            self.register_buffer(f"start_{place}", start.detach().clone())  # not to be looked for again on resuming
            self.register_buffer(f"axes_{place}", axis, persistent=False)

    def outputs(self) -> list[Tensor]:
        """The target outputs as they now are."""
        return [getattr(self, f"start_{place}") + self[0] @ getattr(self, f"axes_{place}").mT
                for place in range(self.layers)]


TargetOutputs = FreeOutputs | OutputsAlongAxes


class LearnedConcept(nn.Module):
    """A concept's word embedding v and target outputs as parameters, its target input i* as a moving average.

    Args:
        embedding: (1, width), the super-category's word embedding, where v starts.
        super_input: i_super (d,): the encoding at the concept's place with the super-category in its stead, averaged
            over the training prompts. i* starts there, too.
        text_layers: layer name -> layer; values start at o*_V = W_V i_super.
        value_input: (d,), an encoding of the super-category in some look: values then start at o*_V = W_V of it.
        locking: "local" locks keys at o*_K = W_K i_super (derived, never stored); "trained" learns them like values.
        looks: (d, d), a covariance of encodings, axes A: target outputs are those of one encoding that all layers are
            given, o*_V = W_V (start + A z), and z is learned (see `OutputsAlongAxes`); None: each by itself, freely.
    """

    def __init__(self, embedding: Tensor, super_input: Tensor, text_layers: Mapping[str, TextLayer],
                 locking: str = "local", looks: Tensor | None = None, value_input: Tensor | None = None) -> None:
        super().__init__()
        if locking not in LOCKINGS:
            raise ValueError(f"locking {locking!r} is not one of {', '.join(LOCKINGS)}")
        self.layer_names = list(text_layers)
        self.embedding = nn.Parameter(embedding.detach().float().clone())
        super_input = super_input.detach().float()
        value_input = super_input if value_input is None else value_input.detach().float()
        values = outputs_of(text_layers, value_input[None], "to_v").values()
        keys = locked_keys(text_layers, super_input[None])

        shared = None if looks is None else axes_of(looks)

        def learned(starts: Iterable[Tensor], projections: Iterable[nn.Linear]) -> TargetOutputs:
            if shared is None:
                return FreeOutputs(starts)
            return OutputsAlongAxes(starts, [layer.weight.detach().float() @ shared.to(layer.weight.device)
                                             for layer in projections])

        layers = text_layers.values()
        self.target_outputs_v = learned(values, [layer.to_v for layer in layers])
        self.target_outputs_k = None if locking == "local" else learned(keys.values(), [layer.to_k for layer in layers])
        self.register_buffer("super_input", super_input.clone())
        self.register_buffer("target_input", super_input.clone())
        self.register_buffer("start", self.embedding.detach().clone(), persistent=False)
        self._locked = None if locking == "trained" else keys

    def values(self) -> list[nn.Parameter]:
        """Every target output that is learned."""
        return [*self.target_outputs_v, *(self.target_outputs_k or ())]

    def edit(self, bias: float, temperature: float, projection: str = "full") -> Edit:
        """The edit that this concept makes now; gradients reach the target outputs."""
        device = self.target_input.device
        keys = self._by_layer(self.target_outputs_k) or {name: key.to(device) for name, key in self._locked.items()}
        return Edit(self.target_input[None], torch.full((1,), bias, device=device),
                    torch.full((1,), temperature, device=device),
                    self._by_layer(self.target_outputs_v), keys, (projection,))

    def _by_layer(self, learned: TargetOutputs | None) -> dict[str, Tensor]:
        return {} if learned is None else dict(zip(self.layer_names, learned.outputs(), strict=True))

    @torch.no_grad()
    def move_target_input(self, encodings: Tensor, decay: float) -> None:
        """i* <- decay i* + (1 - decay) times the mean of the concept token's encodings (n, d)."""
        self.target_input.lerp_(encodings.detach().float().mean(0), 1.0 - decay)

    def distance(self) -> Tensor:
        """How far v has strayed from the super-category's embedding, in units of that one's norm."""
        return (self.embedding.detach() - self.start).norm() / self.start.norm()

    def to_concept(self, **settings: object) -> Concept:
        """The concept as a value; settings are the fields of `Concept` that are not tensors."""
        def kept(learned: TargetOutputs | None) -> dict[str, Tensor]:
            return {name: output[0].detach().clone() for name, output in self._by_layer(learned).items()}

        return Concept(embedding=self.embedding.detach().clone(), target_input=self.target_input.clone(),
                       super_input=self.super_input.clone(), target_output_v=kept(self.target_outputs_v),
                       target_output_k=kept(self.target_outputs_k), **settings)
