"""Wrap the U-Net and route each kind of conditioning to it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext
from ldm.modules.fast.cuda_graphs import GraphedUNet, has_dropout, vector_kwargs
from ldm.modules.fast.fused import can_fuse, fuse
from ldm.modules.fast.sixteen_bits import to_sixteen_bits
from ldm.util import instantiate_from_config

SEQUENTIAL = "sequential_crossattn"
CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
WITH_CHANNELS = ("concat", "hybrid", "hybrid-adm")
WITH_CONTEXT = ("crossattn", "hybrid", "hybrid-adm", "crossattn-adm")
WITH_VECTOR = ("hybrid-adm", "crossattn-adm")
Condition = Tensor | PromptContext | Sequence[Any] | Mapping[str, Any] | None


class DiffusionWrapper(nn.Module):
    """Calls `diffusion_model` with its condition as input channels, cross-attention context, or classes.

    Args:
        diff_model_config: config of the U-Net. A key `sequential_crossattn` in it is read here.
        conditioning_key: None, "concat" (channels), "crossattn" (context), "hybrid" (both) or "adm" (classes);
            "crossattn-adm" and "hybrid-adm" take a vector or classes in addition.

    Attributes:
        sequential_cross_attn: whether the U-Net gets several contexts as a list instead of one after the other.
        graphs: CUDA graphs that run the U-Net, see `enable_fast_inference`; None: the U-Net itself runs.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise UserError(f"conditioning_key {conditioning_key!r} is unknown; choose one of {CONDITIONING_KEYS}")
        self.sequential_cross_attn = bool(diff_model_config.get(SEQUENTIAL, False))
        unet_config = {key: value for key, value in diff_model_config.items() if key != SEQUENTIAL}
        self.diffusion_model = instantiate_from_config(unet_config)
        self.conditioning_key = conditioning_key
        self.graphs: GraphedUNet | None = None

    def forward(self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] | None = None,
                c_crossattn: Sequence[Tensor | PromptContext] | None = None, c_adm: Tensor | None = None) -> Tensor:
        """Return the U-Net's output.

        Args:
            x: (B, C, H, W).
            t: (B,) timesteps.
            c_concat: tensors (B, c, H, W) to append to the channels of x.
            c_crossattn: contexts of the same prompts, concatenated along the tokens; with "adm" the classes.
            c_adm: classes (B,) or vectors (B, d); None: the `vector` of the context, if it has one.

        Raises:
            UserError: if the conditioning key needs a vector, and there is none.
        """
        key = self.conditioning_key
        if key in WITH_CHANNELS:
            x = torch.cat([x, *(c_concat or ())], dim=1)
        if key in WITH_CONTEXT:
            context = self._join(c_crossattn or ())
            if key in WITH_VECTOR and c_adm is None and not vector_kwargs(context):
                raise UserError(f"conditioning_key {key}: needs a condition c_adm")
            return self._attend(x, t, context, c_adm if key in WITH_VECTOR else None)
        if key == "adm":
            return self.diffusion_model(x, t, y=(c_crossattn or ())[0])
        return self.diffusion_model(x, t)

    def _attend(self, x: Tensor, t: Tensor, context: Any, c_adm: Tensor | None) -> Tensor:
        """Call the U-Net with a context, and with a vector if there is one; by CUDA graphs if they are enabled."""
        if c_adm is not None:
            return self.diffusion_model(x, t, context=context, y=c_adm)
        weights = context.weights if isinstance(context, PromptContext) else {}
        if weights:
            options = {"context": context, **vector_kwargs(context)}
            return torch.func.functional_call(self.diffusion_model, dict(weights), (x, t), options)
        if self.graphs is not None:
            return self.graphs(x, t, context=context)
        return self.diffusion_model(x, t, context=context, **vector_kwargs(context))

    def _join(self, contexts: Sequence[Tensor | PromptContext]) -> Any:
        """Return the contexts as one, or as a list if the U-Net's blocks read one after the other."""
        return list(contexts) if self.sequential_cross_attn else concat_contexts(contexts)

    def enable_fast_inference(self, dtype: torch.dtype) -> None:
        """Make a frozen U-Net on a CUDA device fast, for inference and for training around it.

        It gets 16-bit weights of `dtype`, fused kernels, and CUDA graphs if it has no dropout.
        """
        to_sixteen_bits(self.diffusion_model, dtype)
        if can_fuse(next(self.diffusion_model.parameters()).device, dtype):
            fuse(self.diffusion_model)
        if not has_dropout(self.diffusion_model):
            self.graphs = GraphedUNet(self.diffusion_model)


def concat_contexts(contexts: Sequence[Tensor | PromptContext]) -> Tensor | PromptContext | None:
    """Concatenate contexts (B, N, d) along N. A single one is returned unchanged, and no context gives None."""
    if len(contexts) < 2:
        return contexts[0] if contexts else None
    if any(isinstance(context, PromptContext) for context in contexts):
        raise ValueError("a PromptContext cannot be concatenated with other contexts along the tokens")
    return torch.cat(list(contexts), dim=1)


def as_context(condition: Condition) -> Condition:
    """Return encodings and their vector as one `PromptContext`, and any other condition as it is."""
    if not isinstance(condition, Mapping) or condition.keys() != {"c_crossattn", "c_adm"}:
        return condition
    context = concat_contexts(condition["c_crossattn"])
    if isinstance(context, Tensor):
        context = PromptContext.plain(context)
    return replace(context, vector=condition["c_adm"])


def as_model_kwargs(condition: Condition, conditioning_key: str | None) -> Mapping[str, Any]:
    """Return the condition under its keyword of `DiffusionWrapper.forward`."""
    if condition is None:
        return {}
    if isinstance(condition, Mapping):
        return condition
    conditions = condition if isinstance(condition, list | tuple) else [condition]
    return {"c_concat" if conditioning_key == "concat" else "c_crossattn": conditions}
