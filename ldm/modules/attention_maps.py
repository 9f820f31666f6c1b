"""Where in the picture a word of the prompt is looked for: cross-attention, recorded beside the fused computation.

    with recorded_attention(unet, words, latent_size) as maps:
        latents = draw_latents(...)
    early, middle, late = maps.grouped(3)["middle_block.1.transformer_blocks.0.attn2"][0]

Fused attention never holds its probabilities, so they are computed anew from queries and keys while hooks of this
module are on the layers; without them nothing is done and nothing costs. What the layers return stays as it is.

Symbols: B pictures, N tokens, L = h * w positions of a layer, H heads of width d, T evaluations of the U-Net.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.modules.attention import PerfusionCrossAttention, name_text_layers
from ldm.modules.context import PromptContext


@dataclass(eq=False)
class AttentionMaps:
    """Head-averaged maps on the CPU, one for each layer and each evaluation of the U-Net.

    Most samplers evaluate it once per step; Heun's and the first step of PLMS look a step ahead, in the order in which
    these maps lie.

    Attributes:
        layers: layer name -> T maps (B, h, w), float32: how much of its attention each position gives to the word.
    """

    layers: dict[str, list[Tensor]] = field(default_factory=dict)

    def grouped(self, groups: int) -> dict[str, Tensor]:
        """Layer name -> means (B, groups, h, w) over consecutive evaluations, the first ones of most noise.

        Raises:
            ValueError: there are fewer evaluations than groups.
        """
        fewest = min(map(len, self.layers.values()), default=0)
        if fewest < groups:
            raise ValueError(f"{fewest} evaluations cannot make {groups} groups")
        return {name: torch.stack([part.mean(0) for part in torch.stack(maps).tensor_split(groups)], 1)
                for name, maps in self.layers.items()}


def attention_probabilities(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) head by head (Vaswani et al. 2017, eq. 1), in float32 whatever autocast says.

    Args:
        query: (B, L, H * d).
        key: (B, N, H * d).

    Returns:
        (B, H, L, N), over N a distribution.
    """
    q, k = (x.float().unflatten(-1, (heads, -1)) for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):
        return (torch.einsum("blhd,bnhd->bhln", q, k) / math.sqrt(q.shape[-1])).softmax(-1)


@contextmanager
def recorded_attention(unet: nn.Module, words: Tensor, latent_size: tuple[int, int]) -> Iterator[AttentionMaps]:
    """Records, as long as it is open, how the layers of `unet` that read text attend to a word.

    Args:
        words: (B, N), 1 at the word's tokens in each prompt, else 0; what several tokens get is added up. Of larger
            batches, as in guidance, the last B rows count: those are the conditional ones.
        latent_size: (h, w) of the U-Net's input; the layers' maps are it, halved none or more times.

    Raises:
        ValueError: when the U-Net runs: a layer's positions are no such map.
    """
    maps = AttentionMaps()
    with ExitStack() as hooks:
        for name, layer in name_text_layers(unet).items():
            maps.layers[name] = []
            hook = layer.register_forward_hook(_recorder(maps.layers[name], words, latent_size))
            hooks.callback(hook.remove)
        yield maps


Hook = Callable[[PerfusionCrossAttention, tuple[Tensor, Tensor | PromptContext], Tensor], None]


def _recorder(kept: list[Tensor], words: Tensor, latent_size: tuple[int, int]) -> Hook:
    @torch.no_grad()
    def hook(layer: PerfusionCrossAttention, inputs: tuple[Tensor, Tensor | PromptContext], _: Tensor) -> None:
        x, context = inputs
        keys, _ = layer.keys_values(context)  # a context that caches has them from the layer's own call
        count = len(words)
        shares = attention_probabilities(layer.to_q(x[-count:]), keys[-count:], layer.heads).mean(1)
        given = (shares * words.to(shares)[:, None]).sum(-1)
        kept.append(given.unflatten(-1, map_size(x.shape[1], latent_size)).cpu())

    return hook


def map_size(positions: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a layer with so many positions.

    Raises:
        ValueError: halving `latent_size` does not lead to them.
    """
    height, width = latent_size
    while height * width > positions and not (height % 2 or width % 2):
        height, width = height // 2, width // 2
    if height * width != positions:
        raise ValueError(f"{positions} positions are no halved map of {latent_size[0]}x{latent_size[1]} latents")
    return height, width
