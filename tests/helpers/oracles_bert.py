"""Weights of LDM's text encoder under the names that diffusers' independent implementation of it uses."""
from __future__ import annotations

import re

from torch import Tensor

ENDS = {"token_emb": "model.embed_tokens", "pos_emb.emb": "model.embed_positions", "norm": "model.layer_norm",
        "to_logits": "to_logits"}
ATTENTION = {"0": "self_attn_layer_norm", "1.to_q": "self_attn.q_proj", "1.to_k": "self_attn.k_proj",
             "1.to_v": "self_attn.v_proj", "1.to_out": "self_attn.out_proj"}
FEED_FORWARD = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}


def diffusers_bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `TransformerWrapper` as `LDMBertModel` takes it; there two layers of ours are one."""
    return {_place(*key.rsplit(".", 1)): value for key, value in state.items()}


def _place(path: str, kind: str) -> str:
    found = re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.*)", path)
    if not found:
        return f"{ENDS[path]}.{kind}"
    layer, second = divmod(int(found[1]), 2)
    return f"model.layers.{layer}.{(FEED_FORWARD if second else ATTENTION)[found[2]]}.{kind}"
