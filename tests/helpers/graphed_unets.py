"""A small frozen U-Net and its inputs, with a concept in the prompts or without."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.oracles import randomize
from helpers.tiny_models import WIDTH, unet_config
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.edit import Edit
from ldm.util import instantiate_from_config

BATCH, TOKENS = 2, 5


def frozen_unet(checkpointing: bool = False, seed: int = 0) -> nn.Module:
    model = instantiate_from_config(unet_config(use_checkpoint=checkpointing))
    randomize(model, seed)
    return model.eval().requires_grad_(False)


@dataclass
class UNetInputs:
    """Latents, timesteps and encodings for the U-Net, and what a concept adds.

    Attributes:
        x: (B, 4, 8, 8) latents.
        timesteps: (B,).
        encoding: (B, N, d), requires a gradient.
        values: target outputs of values by layer, (1, p) each, require gradients; empty without a concept.
        target_input: (1, d), i*.
    """

    x: Tensor
    timesteps: Tensor
    encoding: Tensor
    values: dict[str, Tensor]
    target_input: Tensor

    @property
    def trainable(self) -> list[Tensor]:
        """The encodings, and the target outputs of the first and the last layer."""
        values = list(self.values.values())
        return [self.encoding, *values[:1], *values[1:][-1:]]

    def context(self, cache: bool = False) -> PromptContext:
        if not self.values:
            return PromptContext.plain(self.encoding, cache)
        one = torch.ones(1, device=self.x.device)
        keys = {name: value.detach() / 2 for name, value in self.values.items()}
        edit = Edit(self.target_input, self.target_input, 0.5 * one, 0.3 * one, self.values, keys, ("gated",))
        return edit.context(self.encoding, cache=cache)

    def take_gradients(self) -> list[Tensor]:
        """Return the accumulated gradients of `trainable`, and clear all gradients."""
        gradients = [tensor.grad.clone() for tensor in self.trainable]
        for tensor in (self.encoding, *self.values.values()):
            tensor.grad = None
        return gradients


def unet_inputs(with_concept: bool, seed: int = 1, device: str = "cpu") -> UNetInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layers = name_text_layers(frozen_unet()) if with_concept else {}
    x, timesteps = normal(BATCH, 4, 8, 8), torch.randint(1000, (BATCH,), generator=generator).to(device)
    encoding = normal(BATCH, TOKENS, WIDTH).requires_grad_()
    values = {name: normal(1, len(layer.to_v.weight)).requires_grad_() for name, layer in layers.items()}
    return UNetInputs(x, timesteps, encoding, values, normal(1, WIDTH))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `exact`."""
    actual, exact = actual.detach().float(), exact.detach().float()
    return float((actual - exact).norm() / exact.norm())
