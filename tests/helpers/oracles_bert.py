"""State dicts of LDM's text encoder with the names of diffusers' independent implementation."""
from __future__ import annotations

import re

from torch import Tensor

ENDS = {"token_emb": "model.embed_tokens", "pos_emb.emb": "model.embed_positions", "norm": "model.layer_norm",
        "to_logits": "to_logits"}
ATTENTION = {"0": "self_attn_layer_norm", "1.to_q": "self_attn.q_proj", "1.to_k": "self_attn.k_proj",
             "1.to_v": "self_attn.v_proj", "1.to_out": "self_attn.out_proj"}
FEED_FORWARD = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}


def diffusers_bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a `TransformerWrapper` for `LDMBertModel`, where one layer is two of ours."""
    return {_diffusers_name(*key.rsplit(".", 1)): value for key, value in state.items()}


def _diffusers_name(path: str, kind: str) -> str:
    match = re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.*)", path)
    if match is None:
        return f"{ENDS[path]}.{kind}"
    layer, second = divmod(int(match[1]), 2)
    return f"model.layers.{layer}.{(FEED_FORWARD if second else ATTENTION)[match[2]]}.{kind}"
