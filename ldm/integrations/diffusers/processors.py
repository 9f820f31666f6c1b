"""Attention processors that apply the edit which packed rows carry, around the processors that a layer has anyway."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.integrations.diffusers.rows import Rows

# Processors that do nothing but attention: they take keys and values from `to_k` and `to_v` of the layer.
SUPPORTED = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", "AttnProcessorNPU",
             "XLAFlashAttnProcessor2_0")


@dataclass(eq=False)
class LayerEdit:
    """What J concepts add to one layer.

    Attributes:
        outputs_v: o*_V, (J, p); zero for concepts that do not use the layer. None: no concept uses it.
        inputs_v: i_super, (J, d), of concepts that do not use the layer, whose values are W_V i_super; zero for the
            others. None: all use it.
        outputs_k: o*_K, (J, p), of concepts with trained keys, zero for the others. None: all keys are locked.
    """

    outputs_v: Tensor | None = None
    inputs_v: Tensor | None = None
    outputs_k: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the tensors, in place."""
        for name, tensor in vars(self).items():
            if tensor is not None:
                setattr(self, name, tensor.to(device, dtype))


class ConceptAttnProcessor:
    """Compute keys and values under the edit, and leave the rest to another processor.

    Rows of the usual width pass through unchanged, so a prompt without concepts gives exactly the usual result.

    Args:
        inner: the processor of the layer.
        width: d, of the text encoding.
        edit: None: the layer reads e, without an edit, as a ControlNet's layers do.
        owner: the concepts that it was installed for.
    """

    def __init__(self, inner: Any, width: int, edit: LayerEdit | None, owner: object) -> None:
        self.inner, self.width, self.edit, self.owner = inner, width, edit, owner

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if encoder_hidden_states is None or encoder_hidden_states.shape[-1] == self.width:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        rows = Rows.unpack(encoder_hidden_states, self.width)
        if self.edit is not None:
            attn = _Edited(attn, *edited_keys_values(attn, rows, self.edit))
        return self.inner(attn, hidden_states, rows.encoding, attention_mask, **kwargs)


def edited_keys_values(attn: Attention, rows: Rows, edit: LayerEdit) -> tuple[Tensor, Tensor]:
    """Return h = W e_perp + sum_j g_j o*_j for the keys and values of a layer, (B, N, p) each.

    The layer's own modules are called, so that what acts on them (LoRA, offloading) acts here too.
    """
    # Keys: locked ones are W_K (e_perp + sum_j g_j i_super_j), trained ones add g_j o*_K.
    keys = attn.to_k(rows.key_input)
    if edit.outputs_k is not None:
        keys = keys + rows.key_gates @ edit.outputs_k.to(keys)

    # Values: W_V e_perp + sum_j g_j o*_V, with o*_V = W_V i_super where a concept does not use the layer.
    source = rows.projected
    if edit.inputs_v is not None:
        source = source + rows.gates @ edit.inputs_v.to(source)
    values = attn.to_v(source)
    if edit.outputs_v is not None:
        values = values + rows.gates @ edit.outputs_v.to(values)
    return keys, values


class _Edited:
    """A layer as the inner processor sees it: its keys and values are computed already."""

    def __init__(self, attn: Attention, keys: Tensor, values: Tensor) -> None:
        self._attn, self._keys, self._values = attn, keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_k(self, *_: Any) -> Tensor:
        return self._keys

    def to_v(self, *_: Any) -> Tensor:
        return self._values


# Installing


def text_layers(model: nn.Module) -> dict[str, Attention]:
    """Return the layers of a U-Net or a ControlNet that read text, by their paths."""
    width = model.config.cross_attention_dim
    return {path: module for path, module in model.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention and module.cross_attention_dim == width}


def check_processors(layers: dict[str, Attention], owner: object) -> None:
    """Raise UserError if a layer computes its keys and values in a way that the edit cannot reach."""
    for path, layer in layers.items():
        processor = layer.processor
        if isinstance(processor, ConceptAttnProcessor) and processor.owner is owner:
            processor = processor.inner
        name = type(processor).__name__
        if "Fused" in name:
            raise UserError("concepts do not work with fused projections; call pipe.unfuse_qkv_projections()")
        if "IPAdapter" in name:
            raise UserError("concepts do not work beside an IP-Adapter; call pipe.unload_ip_adapter()")
        if isinstance(processor, ConceptAttnProcessor):
            raise UserError("this pipeline's U-Net or ControlNet already has the concepts of another pipeline; call "
                            "unload_concepts on that one first, or load_concepts(pipe, its_concepts)")
        if type(processor) not in _supported():
            raise UserError(f"concepts do not work with the attention processor {name} of layer {path}; call "
                            "pipe.unet.set_default_attn_processor()")


def install(layers: dict[str, Attention], width: int, edits: dict[str, LayerEdit], owner: object) -> None:
    """Put a processor around that of each layer, unless it is there. Layers without an entry in `edits` read e."""
    for path, layer in layers.items():
        if not _is_installed(layer, owner):
            layer.processor = ConceptAttnProcessor(layer.processor, width, edits.get(path), owner)


def uninstall(model: nn.Module, owner: object) -> None:
    """Put back the processors that the layers had."""
    for module in model.modules():
        if isinstance(module, Attention) and _is_installed(module, owner):
            module.processor = module.processor.inner
    # Those that `unfuse_qkv_projections` would put back.
    kept = getattr(model, "original_attn_processors", None) or {}
    for path, processor in kept.items():
        if isinstance(processor, ConceptAttnProcessor) and processor.owner is owner:
            kept[path] = processor.inner


def _is_installed(layer: Attention, owner: object) -> bool:
    return isinstance(layer.processor, ConceptAttnProcessor) and layer.processor.owner is owner


def _supported() -> tuple[type, ...]:
    return tuple(getattr(processors, name) for name in SUPPORTED if hasattr(processors, name))
