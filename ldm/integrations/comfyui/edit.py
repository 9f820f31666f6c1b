"""Perfusion's edit of a prompt, packed into one tensor that ComfyUI can carry.

Symbols: a prompt's encoding e (B, N, d), J concepts with input directions i*_j and duals C^-1 i*_j, gates
g_j = sigmoid((s_j - beta_j) / tau_j) with s_j(e) = <i*_j, e> / <i*_j, i*_j>, and e_perp, which is e without the span of
the i*_j. A layer computes h = W e_perp + sum_j g_j o*_j (Tewel et al. 2023, arXiv 2305.01644, Eq. 3).

ComfyUI batches, repeats, concatenates, averages and zeroes encodings as tensors of any width. So what depends on the
prompt travels beside the encoding, on the last axis:

    [ e | key input | value input | gates of keys | gates of values ]     3 d + 2 J numbers per token

What depends on the layer, o*_j, stays with the layers (see `unet`). Keys and values are linear in all of it, so mixing
packed prompts mixes their keys and values.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .concept_file import Concept

RELINK = "connect the CLIP of the last Load Perfusion Concept to the text encoders, and its MODEL to the sampler"
RANK_TOLERANCE = 1e-6  # directions below this share of the largest are rounding noise, as in the project


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed prompt lie.

    Attributes:
        width: d.
        count: J.
    """

    width: int
    count: int

    @property
    def packed_width(self) -> int:
        return 3 * self.width + 2 * self.count

    def encoding(self, packed: Tensor) -> Tensor:
        """Return e."""
        return packed[..., :self.width]

    def keys(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the gates of the keys."""
        start = 3 * self.width
        return packed[..., self.width:2 * self.width], packed[..., start:start + self.count]

    def values(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the gates of the values."""
        return packed[..., 2 * self.width:3 * self.width], packed[..., 3 * self.width + self.count:]

    def acting(self, packed: Tensor) -> list[int]:
        """Return the indices of the concepts that edit a packed prompt: their gates are above 0."""
        _, gates = self.values(packed)
        return gates.flatten(0, -2).any(0).nonzero().flatten().tolist()

    def wrong_width(self, context: Tensor) -> str:
        """Return the message about a prompt that is neither packed for these concepts nor an encoding."""
        return (f"the prompt has {context.shape[-1]} numbers per token, but the model with its {self.count} concepts "
                f"reads {self.packed_width}, or {self.width} without concepts; {RELINK}")

    def plain(self, encoding: Tensor) -> Tensor:
        """Pack a prompt without an edit: every layer computes exactly W_K e and W_V e."""
        no_gates = encoding.new_zeros(*encoding.shape[:-1], 2 * self.count)
        return torch.cat([encoding, encoding, encoding, no_gates], -1)


def pack(encoding: Tensor, concepts: Sequence[Concept], acting: Sequence[int], super_encoding: Tensor | None = None
         ) -> Tensor:
    """Pack a prompt under the edit of some of the concepts.

    Args:
        encoding: e, (B, N, d).
        concepts: all J that are loaded, with the biases and temperatures to use.
        acting: indices of those that edit this prompt; the others act as if they were not loaded.
        super_encoding: (B, N, d), of the prompt with the super-categories in place of the concepts. If given, all keys
            come from it (global locking); otherwise keys are locked where gates open (local locking).

    Returns:
        (B, N, 3 d + 2 J), in the dtype of `encoding`.
    """
    layout = Layout(encoding.shape[-1], len(concepts))
    if not acting:
        return layout.plain(encoding)
    chosen = [concepts[index] for index in acting]
    projected, chosen_gates = _edit(encoding, chosen)
    gates = encoding.new_zeros(*encoding.shape[:-1], len(concepts))
    gates[..., list(acting)] = chosen_gates
    if super_encoding is None:
        return torch.cat([encoding, projected, projected, gates, gates], -1)
    return torch.cat([encoding, super_encoding, projected, torch.zeros_like(gates), gates], -1)


def _edit(encoding: Tensor, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
    """Return e_perp, (B, N, d), and the gates, (B, N, J), of concepts that act together."""
    # Double precision: the duals are ill-conditioned. Apple's GPUs do not have it.
    exact = torch.float32 if encoding.device.type == "mps" else torch.float64
    inputs = torch.stack([concept.target_input for concept in concepts]).to(encoding.device, exact)
    duals = torch.stack([concept.dual for concept in concepts]).to(encoding.device, exact)
    biases, temperatures = (
        torch.tensor([getattr(concept, name) for concept in concepts], device=encoding.device, dtype=exact)
        for name in ("bias", "temperature"))

    # g_j = sigmoid((s_j - beta_j) / tau_j), s_j = <i*_j, e> / ||i*_j||^2
    energies = (inputs * duals).sum(-1)
    products = encoding.to(exact) @ duals.mT
    gates = torch.sigmoid((products / energies - biases) / temperatures)

    # e_perp = e - I^T G^+ D e for the unit directions I, their duals D and the Gram matrix G = D I^T
    norms = energies.sqrt()
    units, unit_duals = inputs / norms[:, None], duals / norms[:, None]
    coefficients = (products / norms) @ _inverse_gram(unit_duals @ units.mT)
    projected = encoding.to(exact) - coefficients @ units
    if all(concept.projection == "gated" for concept in concepts):
        projected = encoding.to(exact).lerp(projected, gates.amax(-1, keepdim=True))
    return projected.to(encoding.dtype), gates.to(encoding.dtype)


def _inverse_gram(gram: Tensor) -> Tensor:
    """Return the pseudo-inverse of a Gram matrix, (J, J), without directions that are rounding noise."""
    values, vectors = torch.linalg.eigh(((gram + gram.mT) / 2).cpu().double())
    kept = values > RANK_TOLERANCE * values[-1]
    return ((vectors[:, kept] / values[kept]) @ vectors[:, kept].mT).to(gram)
