"""The numbers of one concept while they are being learned."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.concepts.concept import Concept
from ldm.modules.context import Edit, TextLayer, locked_keys, outputs_of

LOCKINGS = ("local", "trained")


class TrainableConcept(nn.Module):
    """A concept's word embedding v and target outputs as parameters, its target input i* as a moving average.

    Args:
        embedding: (1, width), the super-category's word embedding, where v starts.
        super_input: i_super (d,): the encoding at the concept's place with the super-category in its stead, averaged
            over the training prompts. i* starts there, too.
        text_layers: layer name -> layer; values start at o*_V = W_V i_super.
        locking: "local" locks keys at o*_K = W_K i_super (derived, never stored); "trained" learns them like values.
    """

    def __init__(self, embedding: Tensor, super_input: Tensor, text_layers: Mapping[str, TextLayer],
                 locking: str = "local") -> None:
        super().__init__()
        if locking not in LOCKINGS:
            raise ValueError(f"locking {locking!r} is not one of {', '.join(LOCKINGS)}")
        self.layer_names = list(text_layers)
        self.embedding = nn.Parameter(embedding.detach().float().clone())
        super_input = super_input.detach().float()
        self.target_outputs_v = nn.ParameterList(outputs_of(text_layers, super_input[None], "to_v").values())
        keys = locked_keys(text_layers, super_input[None])
        self.target_outputs_k = nn.ParameterList(keys.values()) if locking == "trained" else None
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

    def _by_layer(self, learned: nn.ParameterList | None) -> dict[str, Tensor]:
        return {} if learned is None else dict(zip(self.layer_names, learned, strict=True))

    @torch.no_grad()
    def move_target_input(self, encodings: Tensor, decay: float) -> None:
        """i* <- decay i* + (1 - decay) times the mean of the concept token's encodings (n, d)."""
        self.target_input.lerp_(encodings.detach().float().mean(0), 1.0 - decay)

    def distance(self) -> Tensor:
        """How far v has strayed from the super-category's embedding, in units of that one's norm."""
        return (self.embedding.detach() - self.start).norm() / self.start.norm()

    def to_concept(self, **settings: object) -> Concept:
        """The concept as a value; settings are the fields of `Concept` that are not tensors."""
        def kept(learned: nn.ParameterList | None) -> dict[str, Tensor]:
            return {name: output[0].detach().clone() for name, output in self._by_layer(learned).items()}

        return Concept(embedding=self.embedding.detach().clone(), target_input=self.target_input.clone(),
                       super_input=self.super_input.clone(), target_output_v=kept(self.target_outputs_v),
                       target_output_k=kept(self.target_outputs_k), **settings)
