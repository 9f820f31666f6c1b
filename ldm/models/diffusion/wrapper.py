"""The U-Net behind the one door through which a condition reaches it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext
from ldm.modules.fast.cuda_graphs import GraphedUNet, has_dropout
from ldm.modules.fast.fused import can_fuse, fuse
from ldm.modules.fast.sixteen_bits import to_sixteen_bits
from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")
Condition = Tensor | PromptContext | Sequence[Any] | Mapping[str, Sequence[Any]] | None


class DiffusionWrapper(nn.Module):
    """`diffusion_model` with its condition as channels of the input, as cross-attention's context, or as classes.

    Args:
        diff_model_config: config of the U-Net.
        conditioning_key: None, "concat" (channels), "crossattn" (context), "hybrid" (both) or "adm" (classes).

    Attributes:
        graphs: what calls the U-Net in its place, see `enable_fast_inference`; None: nothing.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise UserError(f"conditioning_key {conditioning_key!r} is unknown; choose one of {CONDITIONING_KEYS}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key
        self.graphs: GraphedUNet | None = None

    def forward(self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] | None = None,
                c_crossattn: Sequence[Tensor | PromptContext] | None = None) -> Tensor:
        """x (B, C, H, W), t (B,); several contexts of the same prompts are joined along the tokens."""
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *(c_concat or ())], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            context = concat_contexts(c_crossattn or ())
            weights = context.weights if isinstance(context, PromptContext) else {}
            if weights:
                return torch.func.functional_call(self.diffusion_model, dict(weights), (x, t), {"context": context})
            return (self.graphs or self.diffusion_model)(x, t, context=context)
        if self.conditioning_key == "adm":
            return self.diffusion_model(x, t, y=(c_crossattn or ())[0])
        return self.diffusion_model(x, t)

    def enable_fast_inference(self, dtype: torch.dtype) -> None:
        """Makes a frozen U-Net on a CUDA device as fast as it can be: in `dtype`, of 16 bits, with fused norms, and
        without dropout by graphs."""
        to_sixteen_bits(self.diffusion_model, dtype)
        if can_fuse(next(self.diffusion_model.parameters()).device, dtype):
            fuse(self.diffusion_model)
        if not has_dropout(self.diffusion_model):
            self.graphs = GraphedUNet(self.diffusion_model)


def concat_contexts(contexts: Sequence[Tensor | PromptContext]) -> Tensor | PromptContext | None:
    """One context of several: a single one as it is, tensors (B, N, d) one after another along N."""
    if len(contexts) < 2:
        return contexts[0] if contexts else None
    if any(isinstance(context, PromptContext) for context in contexts):
        raise ValueError("a PromptContext cannot be joined with further contexts along the tokens")
    return torch.cat(list(contexts), dim=1)


def as_model_kwargs(condition: Condition, conditioning_key: str | None) -> Mapping[str, Sequence[Any]]:
    """The condition under the keyword of `DiffusionWrapper.forward` that it belongs to."""
    if condition is None:
        return {}
    if isinstance(condition, Mapping):
        return condition
    several = condition if isinstance(condition, list | tuple) else [condition]
    return {"c_concat" if conditioning_key == "concat" else "c_crossattn": several}
