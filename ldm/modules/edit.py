"""The concepts that edit a batch of prompts, and what the layers need to apply that edit.

`Edit` holds concepts as tensors. `Edit.context` evaluates the parts of Eq. 3 that depend on the prompt only, the gates
and e_perp, and returns a `PromptContext`. Symbols as in `ldm.modules.rank_one`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.modules.context import PromptContext, TextLayer
from ldm.modules.rank_one import PROJECTIONS, gate, gated_projection, has_nonpositive, similarity


@dataclass(eq=False)
class Edit:
    """The concepts that act on prompts, side by side in tensors. Training and sampling both build one.

    Nothing is detached here: if target outputs are parameters or encodings require a gradient, it flows.

    Attributes:
        target_inputs: i*, (J, d), constants; J is at least 1 (for prompts without concepts see `PromptContext.plain`).
        duals: C^-1 i*, (J, d), constants, from `ldm.modules.rank_one.dual_vectors` or the concepts' files.
        biases: beta, (J,).
        temperatures: tau, (J,), above 0.
        target_outputs_v: layer name -> o*_V, (J, p).
        target_outputs_k: layer name -> o*_K, (J, p); for locked keys see `locked_keys`.
        projections: one of `ldm.modules.rank_one.PROJECTIONS` per concept; empty: "full" for all, as in the paper.

    Raises:
        ValueError: shapes do not fit together, or (on the CPU only) a temperature is not above 0.
    """

    target_inputs: Tensor
    duals: Tensor
    biases: Tensor
    temperatures: Tensor
    target_outputs_v: Mapping[str, Tensor]
    target_outputs_k: Mapping[str, Tensor]
    projections: Sequence[str] = ()

    def __post_init__(self) -> None:
        count = len(self.target_inputs)
        if count < 1 or self.target_inputs.ndim != 2:
            raise ValueError(f"target_inputs must be (J, d) with J >= 1, not {tuple(self.target_inputs.shape)}")
        if self.duals.shape != self.target_inputs.shape:
            shapes = tuple(self.target_inputs.shape), tuple(self.duals.shape)
            raise ValueError(f"duals must have the shape of target_inputs, {shapes[0]}, not {shapes[1]}")
        if self.biases.shape != (count,) or self.temperatures.shape != (count,):
            shapes = tuple(self.biases.shape), tuple(self.temperatures.shape)
            raise ValueError(f"biases and temperatures must be ({count},), not {shapes[0]} and {shapes[1]}")
        self.projections = self.projections or ("full",) * count
        if len(self.projections) != count or not set(self.projections) <= set(PROJECTIONS):
            raise ValueError(f"projections must be {count} of {', '.join(PROJECTIONS)}, not {self.projections}")
        if has_nonpositive(self.temperatures):
            raise ValueError(f"every temperature must be above 0, not {self.temperatures.tolist()}")
        self._check_target_outputs(count)

    def _check_target_outputs(self, count: int) -> None:
        if set(self.target_outputs_v) != set(self.target_outputs_k):
            odd = sorted(set(self.target_outputs_v) ^ set(self.target_outputs_k))
            raise ValueError(f"target outputs for keys or for values only, in layers {', '.join(odd)}")
        for layer_name, outputs in (*self.target_outputs_v.items(), *self.target_outputs_k.items()):
            if outputs.ndim != 2 or len(outputs) != count:
                raise ValueError(f"target outputs of {layer_name} must be ({count}, p), not {tuple(outputs.shape)}")

    def context(
        self,
        encoding: Tensor,
        super_encoding: Tensor | None = None,
        cache: bool = False,
    ) -> PromptContext:
        """Return what the layers need of these prompts under this edit (Eq. 3, and its form for several concepts).

        Args:
            encoding: e, (B, N, d), of the prompts with placeholders.
            super_encoding: (B, N, d), of the same prompts, token by token, with the super-category in place of each
                concept. If given, keys are locked globally: they are W_K `super_encoding` for the whole prompt. None:
                keys are locked locally, through the gates.
            cache: see `PromptContext`.

        Raises:
            ValueError: `super_encoding` has another shape than `encoding`.
        """
        if super_encoding is not None and super_encoding.shape != encoding.shape:
            shapes = tuple(super_encoding.shape), tuple(encoding.shape)
            raise ValueError(f"super_encoding must have the shape of encoding, not {shapes[0]} instead of {shapes[1]}")

        # s_j(e) = <i*_j, e> / ||i*_j||^2
        scores = similarity(encoding, self.target_inputs, self.duals)
        # g_j(e) = sigmoid((s_j(e) - beta_j) / tau_j)
        gates = gate(scores, self.biases, self.temperatures).to(encoding.dtype)
        # e_perp = e - sum_k u_k <u_k, e>
        projected = gated_projection(encoding, self.target_inputs, self.duals, gates, self.projections)

        # The layers compute h = W e_perp + sum_j g_j(e) o*_j (see `PromptContext.keys_values`).
        return PromptContext(
            encoding=encoding,
            projected=projected,
            gates=gates,
            target_outputs_v=self.target_outputs_v,
            target_outputs_k=self.target_outputs_k,
            key_projected=super_encoding,
            key_gates=None if super_encoding is None else torch.zeros_like(gates),
            cache=cache,
        )


def locked_keys(text_layers: Mapping[str, TextLayer], super_inputs: Tensor) -> dict[str, Tensor]:
    """Return o*_K = W_K i_super of every layer (key-locking). Arguments and result as for `project_inputs`."""
    return project_inputs(text_layers, super_inputs, "to_k")


@torch.no_grad()
def project_inputs(text_layers: Mapping[str, TextLayer], inputs: Tensor, projection: Literal["to_k", "to_v"]
                   ) -> dict[str, Tensor]:
    """Return W_K i or W_V i of every layer, without gradient.

    Args:
        text_layers: layer name -> layer, from `ldm.modules.attention.name_text_layers`.
        inputs: i, (J, d), such as i_super.
        projection: which of the layers' projections to apply.

    Returns:
        layer name -> (J, p) float32, on the layer's device.
    """
    outputs = {}
    for name, layer in text_layers.items():
        weight = getattr(layer, projection).weight
        with torch.autocast(weight.device.type, enabled=False):
            outputs[name] = inputs.to(weight.device).float() @ weight.float().mT
    return outputs
