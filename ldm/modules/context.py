"""How a batch of encoded prompts, edited by concepts or not, reaches the cross-attention layers.

What the edit of `ldm.modules.rank_one` needs of a prompt (e_perp and the gates) depends neither on the layer nor on
the timestep. `Edit` holds the concepts, `Edit.context` computes those once for a batch of prompts, and the resulting
`PromptContext` goes where a plain tensor of encodings would go. No layer is replaced and no weight changes.

Symbols as in `ldm.modules.rank_one`: B prompts of N tokens, encodings of width d, J concepts, layers of width p.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.modules.rank_one import (
    PROJECTIONS,
    apply_edit,
    gate,
    gated_projection,
    known_nonpositive,
    similarity,
)

PER_PROMPT = ("encoding", "projected", "gates", "key_projected", "key_gates")  # attributes of a `PromptContext`
TABLES = ("target_outputs_v", "target_outputs_k")


class TextLayer(Protocol):
    """A cross-attention layer that reads text, as far as the edit is concerned."""

    to_k: nn.Linear
    to_v: nn.Linear


@dataclass(eq=False)
class PromptContext:
    """A batch of encoded prompts together with the edit of its keys and values.

    Attributes:
        encoding: e, (B, N, d), plain text encodings.
        projected: e_perp, or of gated projections what lies between that and e, (B, N, d), from which values are
            computed; `encoding` itself where there is no concept.
        gates: (B, N, J), J may be 0.
        target_outputs_v: layer name -> o*_V, (J, p); not read while J is 0.
        target_outputs_k: layer name -> o*_K, (J, p); not read while J is 0.
        key_projected: (B, N, d), from which keys are computed; None: `projected`.
        key_gates: (B, N, J); None: `gates`.
        weights: what stands in for weights of the U-Net, by their names in it, while it reads these prompts: methods
            that Perfusion is compared with change them. Not for training.
        cache: whether the keys and values of each layer are computed once and then reused, as in sampling, where they
            are the same at every timestep. Not for training: weights and graph must then stay as they are.
            What `cat`, `repeat`, `select` and `to` return starts with nothing stored, so join before the loop.
    """

    encoding: Tensor
    projected: Tensor
    gates: Tensor
    target_outputs_v: Mapping[str, Tensor]
    target_outputs_k: Mapping[str, Tensor]
    key_projected: Tensor | None = None
    key_gates: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    cache: bool = False
    _cached: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def plain(cls, encoding: Tensor, cache: bool = False, weights: Mapping[str, Tensor] | None = None
              ) -> PromptContext:
        """Prompts without any edit: every layer computes exactly W_K e and W_V e. `encoding`: (B, N, d)."""
        gates = encoding.new_zeros(*encoding.shape[:-1], 0)
        return cls(encoding, encoding, gates, {}, {}, weights=weights or {}, cache=cache)

    @property
    def shape(self) -> torch.Size:
        """(B, N, d)."""
        return self.encoding.shape

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.encoding)

    @property
    def concept_count(self) -> int:
        """J."""
        return self.gates.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.encoding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoding.dtype

    def keys_values(self, layer_name: str, to_k: nn.Linear, to_v: nn.Linear) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (B, N, p).

        Args:
            layer_name: the name under which the concepts' target outputs of this layer are kept.
            to_k: the layer's W_K, without bias.
            to_v: the layer's W_V, without bias.

        Raises:
            ValueError: there are concepts, but none has target outputs for this layer.
        """
        if layer_name not in self._cached:
            found = self._compute_keys_values({layer_name: (to_k.weight, to_v.weight)})
            if not self.cache:
                return found[layer_name]
            self._cached.update(found)
        return self._cached[layer_name]

    def with_keys_values(self, layers: Mapping[str, TextLayer]) -> PromptContext:
        """The same prompts with keys and values of all `layers` stored: by one product each, not one for every layer.

        Raises:
            ValueError: as `keys_values`.
        """
        if layers.keys() <= self._cached.keys():
            return self
        projected = self if self.cache else replace(self)
        projected._cached.update(self._compute_keys_values({name: (layer.to_k.weight, layer.to_v.weight)
                                               for name, layer in layers.items()}))
        return projected

    def clone_cached(self) -> PromptContext:
        """The same prompts with keys and values of their own, where these are stored."""
        copied = replace(self)
        copied._cached.update((layer, (keys.clone(), values.clone())) for layer, (keys, values) in self._cached.items())
        return copied

    def copy_cached_from(self, other: PromptContext) -> None:
        """Puts the keys and values that are stored with `other` in the place of those that are stored here."""
        for layer, tensors in other._cached.items():
            for place, new in zip(self._cached[layer], tensors, strict=True):
                place.copy_(new)

    def _key_side(self) -> tuple[Tensor, Tensor]:
        projected = self.projected if self.key_projected is None else self.key_projected
        return projected, self.gates if self.key_gates is None else self.key_gates

    def _compute_keys_values(self, weights: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values of the layers with these W_K and W_V."""
        for_keys, for_values = zip(*weights.values(), strict=True)
        keys = self._projections(list(weights), for_keys, *self._key_side(), self.target_outputs_k)
        values = self._projections(list(weights), for_values, self.projected, self.gates, self.target_outputs_v)
        return dict(zip(weights, zip(keys, values, strict=True), strict=True))

    def _projections(self, names: Sequence[str], weights: Sequence[Tensor], projected: Tensor, gates: Tensor,
                     outputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """What each layer makes of the prompts: all layers read the same, so that theirs are columns of one product."""
        widths = [len(weight) for weight in weights]
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        if not self.concept_count:
            return functional.linear(projected, weight).split(widths, -1)
        for name in names:
            if name not in outputs:
                raise ValueError(f"no target output for layer {name!r}; there are some for {', '.join(outputs)}")
        joined = torch.cat([outputs[name] for name in names], 1)
        return apply_edit(projected, gates, weight, joined).split(widths, -1)

    def mask_concepts(self, acting: Tensor, target_inputs: Tensor, inverse_covariance: Tensor,
                   projections: Sequence[str]) -> PromptContext:
        """The same prompts, on each of which only some of the concepts act, as if there were no others.

        Args:
            acting: (B, J) booleans.
            target_inputs, projections: i*, (J, d), and the projections of the `Edit` that made this context.
            inverse_covariance: C^-1, (d, d).
        """
        projected, gates = self.encoding.clone(), self.gates * acting[:, None]
        for some in acting.unique(dim=0):
            if some.any():
                rows = (acting == some).all(1)
                own = [projection for projection, acts in zip(projections, some.tolist(), strict=True) if acts]
                projected[rows] = gated_projection(
                    self.encoding[rows], target_inputs[some], inverse_covariance, gates[rows][..., some], own)
        return replace(self, projected=projected, gates=gates)

    @staticmethod
    def cat(contexts: Sequence[PromptContext]) -> PromptContext:
        """The prompts of several contexts as one batch, each still with its own concepts only.

        Contexts made by the same `Edit` share its concepts; otherwise the concepts are put side by side and the gates
        of a prompt are zero for those it does not use, as for all of them in a plain prompt. The result caches if all
        of them do.

        Raises:
            ValueError: they replace weights of the U-Net by different ones, which one batch cannot have.
        """
        if any(context.weights is not contexts[0].weights and (context.weights or contexts[0].weights)
               for context in contexts):
            raise ValueError("prompts under different weights of the U-Net cannot be one batch")
        outputs_v, outputs_k, starts = _side_by_side(contexts)
        total = max(start + context.concept_count for start, context in zip(starts, contexts, strict=True))
        placed = [(context, start, total) for context, start in zip(contexts, starts, strict=True)]
        own_keys = any(c.key_projected is not None or c.key_gates is not None for c in contexts)
        return PromptContext(
            encoding=torch.cat([c.encoding for c in contexts]),
            projected=torch.cat([c.projected for c in contexts]),
            gates=torch.cat([_widened(c.gates, start, total) for c, start, total in placed]),
            target_outputs_v=outputs_v,
            target_outputs_k=outputs_k,
            key_projected=torch.cat([c._key_side()[0] for c in contexts]) if own_keys else None,
            key_gates=torch.cat([_widened(c._key_side()[1], *place) for c, *place in placed]) if own_keys else None,
            weights=contexts[0].weights,
            cache=all(c.cache for c in contexts),
        )

    def repeat(self, n: int) -> PromptContext:
        """The whole batch n times, in the order of `Tensor.repeat(n, 1, 1)`."""
        return self.cat([self] * n)

    def select(self, rows: slice | Sequence[int] | Tensor) -> PromptContext:
        """The prompts at `rows`: a slice, a list of indices, or a tensor of indices or booleans."""
        return self._per_row(lambda tensor: tensor[rows])

    def to(self, *args: torch.device | str | torch.dtype, **kwargs: object) -> PromptContext:
        """Everything on another device or in another dtype; arguments as for `Tensor.to`."""
        moved = self._per_row(lambda tensor: tensor.to(*args, **kwargs))
        for name in (*TABLES, "weights"):
            setattr(moved, name, {layer: o.to(*args, **kwargs) for layer, o in getattr(self, name).items()})
        return moved

    def per_prompt_tensors(self) -> dict[str, Tensor]:
        """The tensors that have a row for each prompt, by their names."""
        return {name: getattr(self, name) for name in PER_PROMPT if getattr(self, name) is not None}

    def _per_row(self, change: Callable[[Tensor], Tensor]) -> PromptContext:
        """A new context with `change` applied to every tensor that has one row per prompt."""
        return replace(self, **{name: change(tensor) for name, tensor in self.per_prompt_tensors().items()})


@dataclass(eq=False)
class Edit:
    """The concepts that act on prompts, side by side in tensors; the trainer and the samplers both build one.

    Nothing here is detached: where target outputs are parameters or encodings require a gradient, it flows.

    Attributes:
        target_inputs: i*, (J, d), constants; J at least 1 (prompts without concepts are `PromptContext.plain`).
        biases: beta, (J,).
        temperatures: tau, (J,), above 0.
        target_outputs_v: layer name -> o*_V, (J, p).
        target_outputs_k: layer name -> o*_K, (J, p); `locked_keys` gives those of locked keys.
        projections: of `ldm.modules.rank_one.PROJECTIONS`, one for each concept; empty: those of the paper.

    Raises:
        ValueError: shapes that do not fit together, or, on the CPU, a temperature that is not above 0.
    """

    target_inputs: Tensor
    biases: Tensor
    temperatures: Tensor
    target_outputs_v: Mapping[str, Tensor]
    target_outputs_k: Mapping[str, Tensor]
    projections: Sequence[str] = ()

    def __post_init__(self) -> None:
        count = len(self.target_inputs)
        if count < 1 or self.target_inputs.ndim != 2:
            raise ValueError(f"target_inputs must be (J, d) with J >= 1, not {tuple(self.target_inputs.shape)}")
        if self.biases.shape != (count,) or self.temperatures.shape != (count,):
            shapes = tuple(self.biases.shape), tuple(self.temperatures.shape)
            raise ValueError(f"biases and temperatures must be ({count},), not {shapes[0]} and {shapes[1]}")
        self.projections = self.projections or ("full",) * count
        if len(self.projections) != count or not set(self.projections) <= set(PROJECTIONS):
            raise ValueError(f"projections must be {count} of {', '.join(PROJECTIONS)}, not {self.projections}")
        if known_nonpositive(self.temperatures):
            raise ValueError(f"every temperature must be above 0, not {self.temperatures.tolist()}")
        if set(self.target_outputs_v) != set(self.target_outputs_k):
            odd = sorted(set(self.target_outputs_v) ^ set(self.target_outputs_k))
            raise ValueError(f"target outputs for keys or for values only, in layers {', '.join(odd)}")
        for layer, outputs in (*self.target_outputs_v.items(), *self.target_outputs_k.items()):
            if outputs.ndim != 2 or len(outputs) != count:
                raise ValueError(f"target outputs of {layer} must be ({count}, p), not {tuple(outputs.shape)}")

    def context(
        self,
        encoding: Tensor,
        inverse_covariance: Tensor,
        super_encoding: Tensor | None = None,
        cache: bool = False,
    ) -> PromptContext:
        """What the layers need of these prompts under this edit (Eq. 3 and its form for several concepts).

        Args:
            encoding: e, (B, N, d), of the prompts with the concepts' words.
            inverse_covariance: C^-1, (d, d).
            super_encoding: (B, N, d), of the same prompts, token by token, with the super-category in each concept's
                stead. Given: keys are global-locked, W_K `super_encoding` for the whole prompt. None: local-locked.
            cache: see `PromptContext`.
        """
        if super_encoding is not None and super_encoding.shape != encoding.shape:
            shapes = tuple(super_encoding.shape), tuple(encoding.shape)
            raise ValueError(f"super_encoding must have the shape of encoding, not {shapes[0]} against {shapes[1]}")
        scores = similarity(encoding, self.target_inputs, inverse_covariance)
        gates = gate(scores, self.biases, self.temperatures).to(encoding.dtype)
        return PromptContext(
            encoding=encoding,
            projected=gated_projection(encoding, self.target_inputs, inverse_covariance, gates, self.projections),
            gates=gates,
            target_outputs_v=self.target_outputs_v,
            target_outputs_k=self.target_outputs_k,
            key_projected=super_encoding,
            key_gates=None if super_encoding is None else torch.zeros_like(gates),
            cache=cache,
        )


def locked_keys(text_layers: Mapping[str, TextLayer], super_inputs: Tensor) -> dict[str, Tensor]:
    """o*_K = W_K i_super of every layer: key-locking. Arguments and result as for `outputs_of`."""
    return outputs_of(text_layers, super_inputs, "to_k")


@torch.no_grad()
def outputs_of(text_layers: Mapping[str, TextLayer], inputs: Tensor, part: Literal["to_k", "to_v"]
               ) -> dict[str, Tensor]:
    """W_K i or W_V i of every layer, without gradient.

    Args:
        text_layers: layer name -> layer, as `ldm.modules.attention.name_text_layers` gives them.
        inputs: i, (J, d), such as i_super.

    Returns:
        layer name -> (J, p) float32, on the layer's device.
    """
    outputs = {}
    for name, layer in text_layers.items():
        weight = getattr(layer, part).weight
        with torch.autocast(weight.device.type, enabled=False):
            outputs[name] = inputs.to(weight.device).float() @ weight.float().mT
    return outputs


def _side_by_side(
    contexts: Sequence[PromptContext],
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], list[int]]:
    """The distinct target outputs of contexts in one table each, and at which row those of each context start."""
    distinct: list[PromptContext] = []
    starts: list[int] = []
    for context in contexts:
        rows = 0
        for known in distinct:
            if _same_outputs(known, context):
                break
            rows += known.concept_count
        else:
            if context.concept_count:
                distinct.append(context)
        starts.append(rows if context.concept_count else 0)
    joined_v = _joined([context.target_outputs_v for context in distinct])
    return joined_v, _joined([context.target_outputs_k for context in distinct]), starts


def _same_outputs(one: PromptContext, other: PromptContext) -> bool:
    pairs = ((one.target_outputs_v, other.target_outputs_v), (one.target_outputs_k, other.target_outputs_k))
    return all(left is right for left, right in pairs)


def _joined(tables: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Target outputs of several edits as one table; that of a single one unchanged, so that it is still recognised."""
    if len(tables) < 2:
        return tables[0] if tables else {}
    return {layer: torch.cat([table[layer] for table in tables]) for layer in tables[0]}


def _widened(gates: Tensor, start: int, total: int) -> Tensor:
    """Gates (B, N, J) as (B, N, total), zero outside of start ... start + J."""
    return functional.pad(gates, (start, total - start - gates.shape[-1]))
