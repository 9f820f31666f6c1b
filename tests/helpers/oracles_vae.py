"""State dicts of our first stage with the names of diffusers' independent implementation."""

from __future__ import annotations

import re

from torch import Tensor

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RENAMES = (  # regular expression of our path, and its replacement
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
    """Convert the state dict of an `AutoencoderKL` with `levels` resolutions for diffusers' class of that name.

    Diffusers counts decoder levels from the coarsest, and has linear layers instead of 1x1 convolutions in attention.
    """
    return {_diffusers_name(key, levels): value.flatten(1) if _is_attention_weight(key) else value
            for key, value in state.items()}


def _is_attention_weight(key: str) -> bool:
    return re.search(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", key) is not None


def _diffusers_name(key: str, levels: int) -> str:
    key = re.sub(r"attn(_1|\.\d+)\.(\w+)\.", lambda match: f"attn{match[1]}.{ATTENTION[match[2]]}.", key)
    key = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", key)
    for ours, theirs in RENAMES:
        key = re.sub(ours, theirs, key)
    return key
