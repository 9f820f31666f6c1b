"""Pass a batch of encoded prompts, with or without the edit of concepts, to the cross-attention layers.

What the edit of `ldm.modules.rank_one` needs of a prompt, e_perp and the gates, depends neither on the layer nor on the
timestep. `ldm.modules.edit` computes both once for a batch of prompts. A `PromptContext` holds the result and goes
wherever a plain tensor of encodings would go. No layer is replaced and no weight changes.

Symbols as in `ldm.modules.rank_one`: B prompts of N tokens, encodings of width d, J concepts, layers of width p.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.modules.rank_one import apply_edit, gated_projection

# Attributes of a `PromptContext` with a row per token, all with a row per prompt, and those with a tensor per layer.
PER_TOKEN = ("encoding", "projected", "gates", "key_projected", "key_gates")
PER_PROMPT = (*PER_TOKEN, "pooled", "vector")
PER_LAYER = ("target_outputs_v", "target_outputs_k")


class TextLayer(Protocol):
    """A cross-attention layer that reads text, as far as the edit needs it."""

    to_k: nn.Linear
    to_v: nn.Linear


@dataclass(eq=False)
class PromptContext:
    """A batch of encoded prompts together with the edit of their keys and values.

    Attributes:
        encoding: e, (B, N, d), the output of the text encoder.
        projected: e_perp, (B, N, d), from which values are computed (see `gated_projection`); equal to `encoding` if
            there is no concept.
        gates: g_j(e), (B, N, J); J may be 0.
        target_outputs_v: layer name -> o*_V, (J, p); not read if J is 0.
        target_outputs_k: layer name -> o*_K, (J, p); not read if J is 0.
        key_projected: (B, N, d), from which keys are computed; None: `projected`.
        key_gates: (B, N, J), gates of the keys; None: `gates`.
        pooled: (B, m), the pooled encoding of each prompt, in models that read it; None in others.
        vector: (B, v), what the U-Net's label embedding reads: the pooled encoding and the features of sizes. None if
            the U-Net reads none.
        weights: name in the U-Net -> weight that replaces it while the U-Net reads these prompts. The baselines use
            it, Perfusion does not. Not for training.
        cache: whether the keys and values of each layer are computed once and then reused, as in sampling, where they
            are the same at every timestep. Not for training, where weights change and each step needs its own graph.
            Contexts that `cat`, `repeat`, `select` and `to` return have an empty cache, so combine prompts before the
            sampling loop.
    """

    encoding: Tensor
    projected: Tensor
    gates: Tensor
    target_outputs_v: Mapping[str, Tensor]
    target_outputs_k: Mapping[str, Tensor]
    key_projected: Tensor | None = None
    key_gates: Tensor | None = None
    pooled: Tensor | None = None
    vector: Tensor | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    cache: bool = False
    _cached: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def plain(cls, encoding: Tensor, cache: bool = False, weights: Mapping[str, Tensor] | None = None,
              pooled: Tensor | None = None) -> PromptContext:
        """Return prompts without an edit: every layer computes exactly W_K e and W_V e.

        Args:
            encoding: e, (B, N, d).
            cache, weights, pooled: as the attributes of this class.
        """
        no_gates = encoding.new_zeros(*encoding.shape[:-1], 0)
        return cls(
            encoding=encoding,
            projected=encoding,
            gates=no_gates,
            target_outputs_v={},
            target_outputs_k={},
            pooled=pooled,
            weights=weights or {},
            cache=cache,
        )

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

    # Keys and values

    def keys_values(self, layer_name: str, to_k: nn.Linear, to_v: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer, (B, N, p) each.

        Args:
            layer_name: the name of the layer in `target_outputs_v` and `target_outputs_k`.
            to_k: the layer's W_K, without bias.
            to_v: the layer's W_V, without bias.

        Raises:
            ValueError: there are concepts, but they have no target outputs for this layer.
        """
        if layer_name in self._cached:
            return self._cached[layer_name]
        computed = self._compute_keys_values({layer_name: (to_k.weight, to_v.weight)})
        if self.cache:
            self._cached.update(computed)
        return computed[layer_name]

    def with_keys_values(self, layers: Mapping[str, TextLayer]) -> PromptContext:
        """Return the same prompts with the keys and values of all layers stored.

        All keys come from one matrix product, and so do all values, which is faster than one product per layer.

        Returns:
            This context if it caches, else a copy.

        Raises:
            ValueError: as `keys_values`.
        """
        if layers.keys() <= self._cached.keys():
            return self
        context = self if self.cache else replace(self)
        weights = {name: (layer.to_k.weight, layer.to_v.weight) for name, layer in layers.items()}
        context._cached.update(self._compute_keys_values(weights))
        return context

    def clone_cached(self) -> PromptContext:
        """Return the same prompts with copies of the vector and of the stored keys and values."""
        copied = replace(self, vector=None if self.vector is None else self.vector.clone())
        for layer_name, (keys, values) in self._cached.items():
            copied._cached[layer_name] = keys.clone(), values.clone()
        return copied

    def copy_cached_from(self, other: PromptContext) -> None:
        """Overwrite the vector and the stored keys and values with those of `other`, in place."""
        if self.vector is not None:
            self.vector.copy_(other.vector)
        for layer_name, (new_keys, new_values) in other._cached.items():
            keys, values = self._cached[layer_name]
            keys.copy_(new_keys)
            values.copy_(new_values)

    def _compute_keys_values(self, weights: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the keys and values of the layers with these W_K and W_V, by layer name."""
        names = list(weights)
        weights_k = [weight_k for weight_k, _ in weights.values()]
        weights_v = [weight_v for _, weight_v in weights.values()]
        keys = self._project(names, weights_k, *self._key_inputs(), self.target_outputs_k)
        values = self._project(names, weights_v, self.projected, self.gates, self.target_outputs_v)
        return {name: (key, value) for name, key, value in zip(names, keys, values, strict=True)}

    def _key_inputs(self) -> tuple[Tensor, Tensor]:
        """Return what keys are computed from: e_perp and the gates, or their replacements under global locking."""
        projected = self.projected if self.key_projected is None else self.key_projected
        gates = self.gates if self.key_gates is None else self.key_gates
        return projected, gates

    def _project(self, names: Sequence[str], weights: Sequence[Tensor], projected: Tensor, gates: Tensor,
                 target_outputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Return h = W e_perp + sum_j g_j o*_j of each layer, (B, N, p) each.

        All layers read the same input, so their outputs are columns of one product.
        """
        widths = [len(weight) for weight in weights]
        joined_weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        if not self.concept_count:
            return functional.linear(projected, joined_weight).split(widths, -1)
        for name in names:
            if name not in target_outputs:
                raise ValueError(f"no target output for layer {name!r}; there are some for {', '.join(target_outputs)}")
        joined_outputs = torch.cat([target_outputs[name] for name in names], 1)
        return apply_edit(projected, gates, joined_weight, joined_outputs).split(widths, -1)

    # Batches

    def mask_concepts(self, acting: Tensor, target_inputs: Tensor, duals: Tensor, projections: Sequence[str]
                      ) -> PromptContext:
        """Return the same prompts, each edited by some of the concepts as if there were no others.

        Args:
            acting: (B, J) booleans, whether concept j edits prompt b.
            target_inputs, duals, projections: i* (J, d), C^-1 i* (J, d) and J projections of the `Edit` that made this
                context.
        """
        projected = self.encoding.clone()
        gates = self.gates * acting[:, None]
        # Prompts with the same concepts share a basis, so project them together.
        for subset in acting.unique(dim=0):
            if not subset.any():
                continue
            rows = (acting == subset).all(1)
            subset_projections = []
            for projection, acts in zip(projections, subset.tolist(), strict=True):
                if acts:
                    subset_projections.append(projection)
            projected[rows] = gated_projection(
                self.encoding[rows],
                target_inputs[subset],
                duals[subset],
                gates[rows][..., subset],
                subset_projections,
            )
        return replace(self, projected=projected, gates=gates)

    def scale_tokens(self, weights: Tensor) -> PromptContext:
        """Return the same prompts with the keys and values of each token multiplied by its weight.

        Args:
            weights: (B, N)
        """
        scale = weights.to(self.encoding)[..., None]
        return self._map_rows(lambda tensor: tensor * scale, PER_TOKEN)

    @staticmethod
    def cat(contexts: Sequence[PromptContext]) -> PromptContext:
        """Join the prompts of several contexts into one batch. Each prompt keeps its own concepts only.

        Contexts of the same `Edit` share its concepts. Otherwise the concepts are put side by side, and the gates of a
        prompt are zero for those it does not use. A plain prompt uses none. The result caches if all contexts do.

        Raises:
            ValueError: the contexts replace weights of the U-Net by different ones, which one batch cannot do; or only
                some have a pooled encoding or a vector.
        """
        first = contexts[0]
        for context in contexts:
            if context.weights is not first.weights and (context.weights or first.weights):
                raise ValueError("prompts under different weights of the U-Net cannot be one batch")

        outputs_v, outputs_k, starts = _join_target_outputs(contexts)
        total = 0
        for context, start in zip(contexts, starts, strict=True):
            total = max(total, start + context.concept_count)

        gates = []
        for context, start in zip(contexts, starts, strict=True):
            gates.append(_pad_gates(context.gates, start, total))

        # Keys have their own inputs if one of the contexts locks them globally.
        key_projected, key_gates = [], []
        own_keys = any(c.key_projected is not None or c.key_gates is not None for c in contexts)
        for context, start in zip(contexts, starts, strict=True):
            if own_keys:
                projected_of_keys, gates_of_keys = context._key_inputs()
                key_projected.append(projected_of_keys)
                key_gates.append(_pad_gates(gates_of_keys, start, total))

        return PromptContext(
            encoding=torch.cat([context.encoding for context in contexts]),
            projected=torch.cat([context.projected for context in contexts]),
            gates=torch.cat(gates),
            target_outputs_v=outputs_v,
            target_outputs_k=outputs_k,
            key_projected=torch.cat(key_projected) if own_keys else None,
            key_gates=torch.cat(key_gates) if own_keys else None,
            pooled=_join_rows(contexts, "pooled"),
            vector=_join_rows(contexts, "vector"),
            weights=first.weights,
            cache=all(context.cache for context in contexts),
        )

    def repeat(self, n: int) -> PromptContext:
        """Repeat the batch n times, in the order of `Tensor.repeat(n, 1, 1)`."""
        return self.cat([self] * n)

    def select(self, rows: slice | Sequence[int] | Tensor) -> PromptContext:
        """Return the prompts at `rows`: a slice, a list of indices, or a tensor of indices or booleans."""
        return self._map_rows(lambda tensor: tensor[rows])

    def to(self, *args: torch.device | str | torch.dtype, **kwargs: object) -> PromptContext:
        """Move every tensor to another device or dtype; arguments as for `Tensor.to`."""
        moved = self._map_rows(lambda tensor: tensor.to(*args, **kwargs))
        for attribute in (*PER_LAYER, "weights"):
            tensors = getattr(self, attribute)
            setattr(moved, attribute, {name: tensor.to(*args, **kwargs) for name, tensor in tensors.items()})
        return moved

    def per_prompt_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that have one row per prompt, by attribute name."""
        return {name: getattr(self, name) for name in PER_PROMPT if getattr(self, name) is not None}

    def _map_rows(self, change: Callable[[Tensor], Tensor], names: Sequence[str] = PER_PROMPT) -> PromptContext:
        """Return a new context with `change` applied to every tensor that has one row per prompt, or to those named."""
        changed = {name: change(tensor) for name, tensor in self.per_prompt_tensors().items() if name in names}
        return replace(self, **changed)


def _join_rows(contexts: Sequence[PromptContext], name: str) -> Tensor | None:
    """Concatenate an attribute that all contexts have, or none of them."""
    tensors = [getattr(context, name) for context in contexts]
    if all(tensor is None for tensor in tensors):
        return None
    if any(tensor is None for tensor in tensors):
        raise ValueError(f"some of these prompts have a {name}, others have none; encode all of them in the same way")
    return torch.cat(tensors)


def _join_target_outputs(
    contexts: Sequence[PromptContext],
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], list[int]]:
    """Put the distinct target outputs of the contexts side by side.

    Returns:
        o*_V and o*_K of all concepts, by layer name, and the row at which the concepts of each context start.
    """
    distinct: list[PromptContext] = []
    starts: list[int] = []
    for context in contexts:
        start = 0
        for known in distinct:
            if _share_target_outputs(known, context):
                break
            start += known.concept_count
        else:
            if context.concept_count:
                distinct.append(context)
        starts.append(start if context.concept_count else 0)
    joined_v = _join_tables([context.target_outputs_v for context in distinct])
    joined_k = _join_tables([context.target_outputs_k for context in distinct])
    return joined_v, joined_k, starts


def _share_target_outputs(one: PromptContext, other: PromptContext) -> bool:
    """Return whether two contexts hold the very same target outputs, as those made by one `Edit` do."""
    return one.target_outputs_v is other.target_outputs_v and one.target_outputs_k is other.target_outputs_k


def _join_tables(tables: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Concatenate target outputs layer by layer. A single table is returned as it is, so it is recognized again."""
    if len(tables) < 2:
        return tables[0] if tables else {}
    return {layer_name: torch.cat([table[layer_name] for table in tables]) for layer_name in tables[0]}


def _pad_gates(gates: Tensor, start: int, total: int) -> Tensor:
    """Return gates (B, N, J) as (B, N, total), with zeros outside of columns start to start + J."""
    return functional.pad(gates, (start, total - start - gates.shape[-1]))
