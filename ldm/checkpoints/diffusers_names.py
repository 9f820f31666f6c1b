"""Weights under the names of `diffusers` and `transformers`, brought under those of CompVis's latent diffusion.

Both sides describe the same networks (Rombach et al., arXiv:2112.10752). What differs is how blocks are numbered, which
follows from how many of them each level has, and thereby from the keys themselves.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
VAE_PLACES = (  # in this order; a level of the decoder is counted from the other end, see `_vae_name`
    (r"_blocks\.(\d+)\.resnets\.", r".\1.block."),
    (r"_blocks\.(\d+)\.attentions\.", r".\1.attn."),
    (r"_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2sample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"(attn[._]\d+)\.group_norm\.", r"\1.norm."),
    (r"(attn[._]\d+)\.(?:to_out\.0|proj_attn)\.", r"\1.proj_out."),
    (r"(attn[._]\d+)\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r"\1.\2."),  # to_q, of older files query, and so on
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
CLIP_TO_OPEN_CLIP = (
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.", ""),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"transformer.resblocks.\1.attn.in_proj_\2."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
)
STACKED = re.compile(r"(.*\.in_proj_)([qkv])\.(weight|bias)")  # one projection there, three here
BERT_LAYER = {  # within a layer: which of the two sublayers, and the place in it
    "self_attn_layer_norm": (0, "0"), "self_attn.q_proj": (0, "1.to_q"), "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"), "self_attn.out_proj": (0, "1.to_out"),
    "final_layer_norm": (1, "0"), "fc1": (1, "1.net.0.0"), "fc2": (1, "1.net.2"),
}
BERT_ENDS = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb", "model.layer_norm": "norm",
             "to_logits": "to_logits"}


def unet_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """A `UNet2DConditionModel` as a `UNetModel`; keys that it has no place for keep their names."""
    name = _unet_namer(tensors)
    return {name(key): tensor for key, tensor in tensors.items()}


def vae_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """An `AutoencoderKL` or `VQModel` of diffusers as the class of that name here.

    The linear layers of attention become 1x1 convolutions.
    """
    levels = len(_blocks_per_level(tensors, "decoder.up"))
    named = {_vae_name(key, levels): tensor for key, tensor in tensors.items()}
    return {key: tensor[..., None, None] if _is_flat_projection(key, tensor) else tensor
            for key, tensor in named.items()}


def clip_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """A `CLIPTextModel`, in whichever of its two spellings, as a `FrozenCLIPEmbedder`."""
    return {f"transformer.text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}


def bert_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """The `LDMBertModel` of diffusers as a `BERTEmbedder`."""
    return {f"transformer.{_bert_name(key)}": tensor for key, tensor in tensors.items()}


def open_clip_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """The text tower of a `FrozenCLIPEmbedder` (its keys from `embeddings.` and `encoder.` on) as open_clip has it."""
    named = {_replaced(key, CLIP_TO_OPEN_CLIP): tensor for key, tensor in tensors.items()}
    whole = {key: tensor for key, tensor in named.items() if not STACKED.fullmatch(key)}
    stacks = dict.fromkeys(found.group(1, 3) for key in named if (found := STACKED.fullmatch(key)))
    for start, kind in stacks:
        parts = [named[key] for part in "qkv" if (key := f"{start}{part}.{kind}") in named]
        whole[start + kind] = torch.cat(parts)
    return whole


def clip_text_tensors(tensors: Tensors, keys: Iterable[str]) -> dict[str, Tensor]:
    """The other way round: what open_clip's text tower has for the keys of a `CLIPTextModel`."""
    found = {}
    for key in keys:
        name = _replaced(key, CLIP_TO_OPEN_CLIP)
        part = STACKED.fullmatch(name)
        found[key] = (tensors[part[1] + part[3]].chunk(3)["qkv".index(part[2])] if part else tensors[name]).clone()
    return found


def _unet_namer(keys: Iterable[str]) -> Callable[[str], str]:
    keys = list(keys)
    down, up = _blocks_per_level(keys, "down"), _blocks_per_level(keys, "up")
    attending = {key.split(".")[1] for key in keys if re.match(r"up_blocks\.\d+\.attentions\.", key)}

    def place(half: str, level: str, kind: str, index: str) -> str:
        number = int(level)
        if kind == "downsamplers":  # a block of its own, after the level's others
            return f"input_blocks.{sum(down[:number + 1]) + number + 1}.0"
        if kind == "upsamplers":  # the last thing in the level's last block
            return f"output_blocks.{sum(up[:number + 1]) - 1}.{1 + (level in attending)}"
        first = sum(down[:number]) + number + 1 if half == "down" else sum(up[:number])
        return f"{'input' if half == 'down' else 'output'}_blocks.{first + int(index)}.{int(kind == 'attentions')}"

    def name(key: str) -> str:
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
            return f"{place(*found.groups()[:4])}.{_unet_inner(found[3], found[5])}"
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
            number = 1 if found[1] == "attentions" else 2 * int(found[2])
            return f"middle_block.{number}.{_unet_inner(found[1], found[3])}"
        return _begun(key, UNET_ENDS)

    return name


def _unet_inner(kind: str, rest: str) -> str:
    """The place within a block: attention has one set of names on both sides."""
    if kind == "downsamplers":
        return f"op.{rest.removeprefix('conv.')}"
    return _begun(rest, RESNET) if kind == "resnets" else rest


def _blocks_per_level(keys: Iterable[str], half: str) -> list[int]:
    """How many residual blocks each level of `half` has, in the order of the levels' numbers."""
    places = {found.groups() for key in keys
              if (found := re.match(rf"{re.escape(half)}_blocks\.(\d+)\.resnets\.(\d+)\.", key))}
    levels = [int(level) for level, _ in places]
    return [levels.count(level) for level in range(max(levels, default=-1) + 1)]


def _vae_name(key: str, levels: int) -> str:
    key = _replaced(key, VAE_PLACES)
    return re.sub(r"(?<=decoder\.up\.)\d+", lambda found: str(levels - 1 - int(found[0])), key)


def _is_flat_projection(key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and re.search(r"attn[._]\d+\.(q|k|v|proj_out)\.weight$", key) is not None


def _bert_name(key: str) -> str:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if found and found[2] in BERT_LAYER:
        sublayer, place = BERT_LAYER[found[2]]
        return f"attn_layers.layers.{2 * int(found[1]) + sublayer}.{place}.{found[3]}"
    return _begun(key, BERT_ENDS)


def _begun(key: str, beginnings: Mapping[str, str]) -> str:
    """`key` with the one of `beginnings` that it has replaced."""
    theirs = next((beginning for beginning in beginnings if key.startswith(f"{beginning}.")), None)
    return key if theirs is None else beginnings[theirs] + key.removeprefix(theirs)


def _replaced(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
