"""The numbers of one concept while they are being learned."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.modules.concept import Concept
from ldm.modules.context import Edit, TextLayer, locked_keys

LOCKINGS = ("local", "trained")


class LearnedConcept(nn.Module):
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
        values = [super_input[None] @ layer.to_v.weight.detach().float().T for layer in text_layers.values()]
        self.target_outputs_v = nn.ParameterList(values)
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
        trained = self.target_outputs_k
        keys = dict(zip(self.layer_names, trained, strict=True)) if trained is not None else {
            name: key.to(device) for name, key in self._locked.items()}
        return Edit(self.target_input[None], torch.tensor([bias], device=device),
                    torch.tensor([temperature], device=device),
                    dict(zip(self.layer_names, self.target_outputs_v, strict=True)), keys, (projection,))

    @torch.no_grad()
    def move_target_input(self, encodings: Tensor, decay: float) -> None:
        """i* <- decay i* + (1 - decay) times the mean of the concept token's encodings (n, d)."""
        self.target_input.lerp_(encodings.detach().float().mean(0), 1.0 - decay)

    def distance(self) -> Tensor:
        """How far v has strayed from the super-category's embedding, in units of that one's norm."""
        return (self.embedding.detach() - self.start).norm() / self.start.norm()

    def to_concept(self, **settings: object) -> Concept:
        """The concept as a value; settings are the fields of `Concept` that are not tensors."""
        def named(outputs: nn.ParameterList | None) -> dict[str, Tensor]:
            return {name: output[0].detach().clone() for name, output in zip(self.layer_names, outputs or (),
                                                                           strict=outputs is not None)}

        return Concept(embedding=self.embedding.detach().clone(), target_input=self.target_input.clone(),
                       super_input=self.super_input.clone(), target_output_v=named(self.target_outputs_v),
                       target_output_k=named(self.target_outputs_k), **settings)
