"""CLIP's text model with the attributes that it had in transformers 4, for code that replaces or calls its parts.

transformers 5 dropped the level `text_model`, and its layers return tensors in place of tuples.
"""
from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn


class OldLayer(nn.Module):
    """Base class for what a layer of CLIP is turned into: it takes two masks and returns a tuple."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, causal_attention_mask: Tensor | None,
                output_attentions: bool = False) -> tuple[Tensor]:
        masks = [mask for mask in (attention_mask, causal_attention_mask) if mask is not None]
        return (self.new_forward(hidden_states, sum(masks[1:], masks[0]) if masks else None),)


class OldEncoder(nn.Module):
    """What the stack of layers is turned into."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None,
                causal_attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor]:
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, causal_attention_mask)[0]
        return (hidden,)


class OldTextModel(nn.Module):
    """What the model of transformers 5 is turned into: the level `text_model`."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        hidden = self.embeddings(input_ids=input_ids)
        mask = self._build_causal_attention_mask(*input_ids.shape, hidden.dtype)
        states = [hidden]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], None, mask)[0])
        last = self.final_layer_norm(states[-1])
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            last_hidden_state=last, hidden_states=tuple(states),
            pooler_output=last[torch.arange(len(last)), input_ids.argmax(dim=-1)])

    def _build_causal_attention_mask(self, count: int, length: int, dtype: torch.dtype) -> Tensor:
        mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu_(1)
        return mask.expand(count, 1, length, length)


class OldCLIPTextModel(nn.Module):
    """CLIP's text model as transformers 4 has it, around the one that is installed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model, self.config = model, model.config
        # Replace methods one by one, so that modules and keys of the state dict stay what they are.
        replace_methods(model, OldTextModel)
        replace_methods(model.encoder, OldEncoder)
        for layer in model.encoder.layers:
            layer.new_forward = layer.forward
            replace_methods(layer, OldLayer)

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> OldCLIPTextModel:
        return cls(NewCLIPTextModel.from_pretrained(name, **options).eval())

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return self.text_model(input_ids=input_ids, **options)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_model.get_input_embeddings()

    def resize_token_embeddings(self, count: int) -> nn.Embedding:
        return self.text_model.resize_token_embeddings(count)


NewCLIPTextModel = transformers.CLIPTextModel


def replace_methods(module: nn.Module, source: type[nn.Module]) -> None:
    """Give one module the methods that a class defines."""
    for name, value in vars(source).items():
        if callable(value) and not name.startswith("__"):
            object.__setattr__(module, name, MethodType(value, module))


def install_old_clip() -> None:
    """Put the model with the old attributes in the place of the new one."""
    transformers.CLIPTextModel = OldCLIPTextModel
