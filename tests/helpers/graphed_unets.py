"""A small frozen U-Net, and what it is called with: prompts, under the edit of a concept or not."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.oracles import randomize
from helpers.tiny_models import WIDTH, unet_config
from ldm.modules.attention import name_text_layers
from ldm.modules.context import Edit, PromptContext
from ldm.util import instantiate_from_config

BATCH, TOKENS = 2, 5


def frozen_unet(checkpointing: bool = False, seed: int = 0) -> nn.Module:
    model = instantiate_from_config(unet_config(use_checkpoint=checkpointing))
    randomize(model, seed)
    return model.eval().requires_grad_(False)


@dataclass
class UNetInputs:
    """Latents, timesteps and encodings, and where there is a concept its i* and its target outputs, by layer."""

    x: Tensor
    timesteps: Tensor
    encoding: Tensor
    values: dict[str, Tensor]
    target_input: Tensor

    @property
    def learned(self) -> list[Tensor]:
        """The encodings and the first and last target outputs."""
        values = list(self.values.values())
        return [self.encoding, *values[:1], *values[1:][-1:]]

    def context(self, cache: bool = False) -> PromptContext:
        if not self.values:
            return PromptContext.plain(self.encoding, cache)
        one = torch.ones(1, device=self.x.device)
        keys = {name: value.detach() / 2 for name, value in self.values.items()}
        edit = Edit(self.target_input, 0.5 * one, 0.3 * one, self.values, keys, ("gated",))
        return edit.context(self.encoding, torch.eye(WIDTH, device=self.x.device), cache=cache)

    def take_gradients(self) -> list[Tensor]:
        """Those that have been added up, which begin at nothing again."""
        found = [tensor.grad.clone() for tensor in self.learned]
        for tensor in (self.encoding, *self.values.values()):
            tensor.grad = None
        return found


def unet_inputs(edited: bool, seed: int = 1, device: str = "cpu") -> UNetInputs:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layers = name_text_layers(frozen_unet()) if edited else {}
    return UNetInputs(drawn(BATCH, 4, 8, 8), torch.randint(1000, (BATCH,), generator=generator).to(device),
                drawn(BATCH, TOKENS, WIDTH).requires_grad_(),
                {name: drawn(1, len(layer.to_v.weight)).requires_grad_() for name, layer in layers.items()},
                drawn(1, WIDTH))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Relative to the whole."""
    found, exact = found.detach().float(), exact.detach().float()
    return float((found - exact).norm() / exact.norm())
