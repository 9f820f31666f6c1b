"""Record where in the image each layer looks for a word of the prompt (cross-attention maps).

    with record_attention(unet, words, latent_size) as maps:
        ...  # sample
    early, middle, late = maps.grouped(3)["middle_block.1.transformer_blocks.0.attn2"][0]

Fused attention never stores its probabilities, so forward hooks compute them again from queries and keys. What the
layers return does not change, and without hooks there is no cost.

Symbols: B images, N tokens, L = h * w positions of a layer, H heads of width d, T evaluations of the U-Net.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention, name_text_layers
from ldm.modules.context import PromptContext

Hook = Callable[[CrossAttention, tuple[Tensor, Tensor | PromptContext], Tensor], None]


@dataclass(eq=False)
class AttentionMaps:
    """Attention maps averaged over heads, on the CPU: one per layer and evaluation of the U-Net.

    Most samplers evaluate the U-Net once per step. Heun's method and the first step of PLMS also evaluate it one step
    ahead; maps are in the order of evaluation.

    Attributes:
        layers: layer name -> T maps (B, h, w), float32: the share of attention that each position gives the word.
    """

    layers: dict[str, list[Tensor]] = field(default_factory=dict)

    def grouped(self, groups: int) -> dict[str, Tensor]:
        """Average maps over groups of consecutive evaluations, the noisiest first.

        Returns:
            layer name -> (B, groups, h, w).

        Raises:
            ValueError: there are fewer evaluations than groups.
        """
        fewest = min(map(len, self.layers.values()), default=0)
        if fewest < groups:
            raise ValueError(f"{fewest} evaluations cannot make {groups} groups")
        means = {}
        for name, maps in self.layers.items():
            splits = torch.stack(maps).tensor_split(groups)
            means[name] = torch.stack([split.mean(0) for split in splits], 1)
        return means


def attention_probabilities(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) of each head (Vaswani et al. 2017, Eq. 1), in float32 even under autocast.

    Args:
        query: (B, L, H * d).
        key: (B, N, H * d).
        heads: H.

    Returns:
        (B, H, L, N), summing to 1 over N.
    """
    q, k = (x.float().unflatten(-1, (heads, -1)) for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):
        return (torch.einsum("blhd,bnhd->bhln", q, k) / math.sqrt(q.shape[-1])).softmax(-1)


@contextmanager
def record_attention(unet: nn.Module, words: Tensor, latent_size: tuple[int, int]) -> Iterator[AttentionMaps]:
    """Record how the text-reading layers of a U-Net attend to a word, while the context manager is open.

    Args:
        unet: the U-Net.
        words: (B, N), 1 at the tokens of the word in each prompt, else 0. The attention to several tokens is summed.
            In larger batches, as with guidance, the last B rows count: they are the conditional ones.
        latent_size: (h, w) of the U-Net's input. Maps have this size, halved as often as the layer's level requires.

    Yields:
        The maps, which grow with each evaluation of the U-Net.

    Raises:
        ValueError: (when the U-Net runs) the number of positions in a layer does not fit `latent_size`.
    """
    maps = AttentionMaps()
    with ExitStack() as hooks:
        for name, layer in name_text_layers(unet).items():
            maps.layers[name] = []
            hook = layer.register_forward_hook(_make_hook(maps.layers[name], words, latent_size))
            hooks.callback(hook.remove)
        yield maps


def _make_hook(recorded: list[Tensor], words: Tensor, latent_size: tuple[int, int]) -> Hook:
    """Return a forward hook that appends one map (B, h, w) per call to `recorded`."""

    @torch.no_grad()
    def hook(layer: CrossAttention, inputs: tuple[Tensor, Tensor | PromptContext], _: Tensor) -> None:
        x, context = inputs
        keys, _ = layer.keys_values(context)  # a context that caches has them from the layer's own call

        # Probabilities of the conditional rows, averaged over heads: (B, L, N).
        count = len(words)
        query = layer.to_q(x[-count:])
        probabilities = attention_probabilities(query, keys[-count:], layer.heads).mean(1)

        # The share of the word's tokens at each position: (B, L).
        share = (probabilities * words.to(probabilities)[:, None]).sum(-1)
        recorded.append(share.unflatten(-1, map_size(x.shape[1], latent_size)).cpu())

    return hook


def map_size(positions: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size (h, w) of a layer's feature map from its number of positions.

    Raises:
        ValueError: halving `latent_size` does not lead to that number.
    """
    height, width = latent_size
    while height * width > positions and not (height % 2 or width % 2):
        height, width = height // 2, width // 2
    if height * width != positions:
        raise ValueError(f"{positions} positions do not fit {latent_size[0]}x{latent_size[1]} latents, halved or not")
    return height, width
