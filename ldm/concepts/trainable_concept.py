"""The parameters of one Perfusion concept during training."""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.concepts.concept import Concept
from ldm.concepts.word_norms import relative_norm, restore_norms
from ldm.modules.context import TextLayer
from ldm.modules.edit import Edit, locked_keys, project_inputs
from ldm.modules.rank_one import dual_vectors

LOCKINGS = ("local", "trained")


class TrainableConcept(nn.Module):
    """Word embedding v and target outputs o* as parameters, and target input i* as a moving average.

    Args:
        embedding: (1, width), the word embedding of the super-category; v starts there.
        super_input: i_super (d,), the encoding at the concept's position with the super-category in its place, averaged
            over the training prompts. i* starts there, too.
        text_layers: layer name -> layer; o*_V starts at W_V i_super.
        locking: "local" locks keys to o*_K = W_K i_super, which is derived and never stored; "trained" trains o*_K
            like o*_V.
        trained_layers: names of the layers whose target outputs are trained; empty: all. The others keep those of the
            super-category, W_V i_super and W_K i_super.

    Attributes:
        origin: texts that describe what the concept is learned from, by attribute of `Concept`, such as "resolution".

    Raises:
        ValueError: the locking is unknown.
    """

    def __init__(self, embedding: Tensor, super_input: Tensor, text_layers: Mapping[str, TextLayer],
                 locking: str = "local", trained_layers: Collection[str] = ()) -> None:
        super().__init__()
        if locking not in LOCKINGS:
            raise ValueError(f"locking {locking!r} is not one of {', '.join(LOCKINGS)}")
        super_input = super_input.detach().float()
        keys = locked_keys(text_layers, super_input[None])
        values = project_inputs(text_layers, super_input[None], "to_v")
        self._super_values = {name: value.clone() for name, value in values.items()}
        self.origin: dict[str, str] = {}
        self.layer_names = [name for name in text_layers if not trained_layers or name in trained_layers]

        # Trained: v and o*_V, and o*_K if keys are not locked.
        self.embedding = nn.Parameter(embedding.detach().float().clone())
        self.target_outputs_v = nn.ParameterList([values.pop(name) for name in self.layer_names])
        self.target_outputs_k = None
        if locking == "trained":
            self.target_outputs_k = nn.ParameterList([keys.pop(name) for name in self.layer_names])
        # What is left stays: locked keys, and the values of layers that are not trained.
        self._fixed_keys, self._fixed_values = keys, values

        # Not trained: i_super, and i*, which `move_target_input` updates.
        self.register_buffer("super_input", super_input.clone())
        self.register_buffer("target_input", super_input.clone())
        self.register_buffer("start", self.embedding.detach().clone(), persistent=False)

    @torch.no_grad()
    def start_at(self, embedding: Tensor, target_input: Tensor) -> None:
        """Start at another word than the super-category's.

        Args:
            embedding: v, (1, width).
            target_input: i*, (d,), the encoding at the concept's position with that word, averaged over the prompts.
        """
        self.embedding.copy_(embedding)
        self.start.copy_(embedding)
        self.target_input.copy_(target_input)

    @torch.no_grad()
    def start_values_at(self, encoding: Tensor, text_layers: Mapping[str, TextLayer]) -> None:
        """Start o*_V of the trained layers at W_V times an encoding (d,), in place of W_V i_super."""
        values = project_inputs(text_layers, encoding[None], "to_v")
        for name, output in self._by_layer(self.target_outputs_v).items():
            output.copy_(values[name])

    def values(self) -> list[nn.Parameter]:
        """Return every target output that is trained."""
        return [*self.target_outputs_v, *(self.target_outputs_k or ())]

    def edit(self, bias: float, temperature: float, inverse_covariance: Tensor, projection: str = "full") -> Edit:
        """Return the edit that this concept makes at the moment; gradients flow to the target outputs.

        Args:
            bias: beta.
            temperature: tau.
            inverse_covariance: C^-1, (d, d), for the dual of the current i*.
            projection: one of `ldm.modules.rank_one.PROJECTIONS`.
        """
        device = self.target_input.device
        keys = {name: key.to(device) for name, key in self._fixed_keys.items()}
        values = {name: value.to(device) for name, value in self._fixed_values.items()}
        if self.target_outputs_k is not None:
            keys |= self._by_layer(self.target_outputs_k)
        return Edit(
            target_inputs=self.target_input[None],
            duals=dual_vectors(self.target_input[None], inverse_covariance),
            biases=torch.full((1,), bias, device=device),
            temperatures=torch.full((1,), temperature, device=device),
            target_outputs_v=values | self._by_layer(self.target_outputs_v),
            target_outputs_k=keys,
            projections=(projection,),
        )

    def _by_layer(self, target_outputs: nn.ParameterList) -> dict[str, Tensor]:
        return dict(zip(self.layer_names, target_outputs, strict=True))

    @torch.no_grad()
    def move_target_input(self, encodings: Tensor, decay: float) -> None:
        """Update the moving average: i* <- decay i* + (1 - decay) mean(encodings).

        Args:
            encodings: (n, d), encodings of the concept's token in the prompts of a batch.
            decay: at least 0 and below 1.
        """
        self.target_input.lerp_(encodings.detach().float().mean(0), 1.0 - decay)

    def distance(self) -> Tensor:
        """Return the distance of v from its start, relative to the norm of the start."""
        return (self.embedding.detach() - self.start).norm() / self.start.norm()

    def relative_norm(self, widths: Sequence[int]) -> Tensor:
        """Return the largest ratio of v's norm to that of its start; `widths` as for `word_norms.part_norms`."""
        return relative_norm(self.embedding.detach(), self.start, widths)

    def restore_norms(self, widths: Sequence[int]) -> None:
        """Scale v to the norm of its start, for each text encoder; `widths` as for `word_norms.part_norms`."""
        restore_norms(self.embedding, self.start, widths)

    def to_concept(self, inverse_covariance: Tensor, shares: Mapping[str, float] | None = None, **settings: object
                   ) -> Concept:
        """Return a copy of the concept as a value.

        Args:
            inverse_covariance: C^-1, (d, d), used in training.
            shares: layer name -> share of what it has learned in its o*_V, from 0 (W_V i_super) to 1 (all of it, like
                the layers that are not named).
            settings: the attributes of `Concept` that are not tensors.
        """
        dual = dual_vectors(self.target_input[None], inverse_covariance)[0]
        energy = float(self.target_input.to(dual.dtype) @ dual)
        return Concept(
            embedding=self.embedding.detach().clone(),
            target_input=self.target_input.clone(),
            dual=dual,
            target_energy=energy if math.isfinite(energy) else None,  # not finite: training diverged, saving will raise
            super_input=self.super_input.clone(),
            target_outputs_v=self._mix(self._copy_outputs(self.target_outputs_v), shares or {}),
            target_outputs_k={} if self.target_outputs_k is None else self._copy_outputs(self.target_outputs_k),
            **self.origin,
            **settings,
        )

    def _copy_outputs(self, target_outputs: nn.ParameterList) -> dict[str, Tensor]:
        """Return layer name -> (p,)."""
        return {name: output[0].detach().clone() for name, output in self._by_layer(target_outputs).items()}

    def _mix(self, outputs: Mapping[str, Tensor], shares: Mapping[str, float]) -> dict[str, Tensor]:
        """Return W_V i_super + share (o*_V - W_V i_super) of each layer."""
        return {name: self._super_values[name][0].to(output).lerp(output, shares[name]) if name in shares else output
                for name, output in outputs.items()}
