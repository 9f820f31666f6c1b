"""Weights of our first stage under the names that diffusers' independent implementation of the same network uses."""

from __future__ import annotations

import re

from torch import Tensor

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
PLACES = (  # our path, theirs; a level's number is written L on both sides
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def diffusers_vae_state(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The state dict of an `AutoencoderKL` of `levels` resolutions as diffusers' class of that name takes it.

    There decoder levels are counted from the coarsest, and attention's 1x1 convolutions are linear layers.
    """
    return {
        _theirs(key, levels): value.flatten(1) if _is_attention_weight(key) else value for key, value in state.items()
    }


def _is_attention_weight(key: str) -> bool:
    return re.search(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key) is not None


def _theirs(key: str, levels: int) -> str:
    key = re.sub(r"attn(_1|\.\d+)\.(\w+)\.", lambda found: f"attn{found[1]}.{ATTENTION[found[2]]}.", key)
    key = re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", key)
    for ours, theirs in PLACES:
        key = re.sub(ours, theirs, key)
    return key
