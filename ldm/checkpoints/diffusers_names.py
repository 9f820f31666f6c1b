"""Convert the names of weights between `diffusers` or `transformers` and CompVis's latent diffusion.

Both name the same networks (Rombach et al., arXiv:2112.10752) but number the blocks differently. The numbers follow
from the blocks per level, and those from the keys themselves.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

UNET_PREFIXES = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}
RESNET_PREFIXES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
VAE_RULES = (  # applied in this order; the decoder counts its levels from the other end, see `_vae_name`
    (r"_blocks\.(\d+)\.resnets\.", r".\1.block."),
    (r"_blocks\.(\d+)\.attentions\.", r".\1.attn."),
    (r"_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2sample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"(attn[._]\d+)\.group_norm\.", r"\1.norm."),
    (r"(attn[._]\d+)\.(?:to_out\.0|proj_attn)\.", r"\1.proj_out."),
    (r"(attn[._]\d+)\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r"\1.\2."),  # to_q, in older files query, and so on
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
CLIP_TO_OPEN_CLIP_RULES = (
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.", ""),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"transformer.resblocks.\1.attn.in_proj_\2."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
)
STACKED = re.compile(r"(.*\.in_proj_)([qkv])\.(weight|bias)")  # open_clip stacks the three projections in one
BERT_LAYER_NAMES = {  # name in a layer -> index of the sublayer, name in the sublayer
    "self_attn_layer_norm": (0, "0"), "self_attn.q_proj": (0, "1.to_q"), "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"), "self_attn.out_proj": (0, "1.to_out"),
    "final_layer_norm": (1, "0"), "fc1": (1, "1.net.0.0"), "fc2": (1, "1.net.2"),
}
BERT_PREFIXES = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb", "model.layer_norm": "norm",
                 "to_logits": "to_logits"}


def unet_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Rename a `UNet2DConditionModel` to a `UNetModel`. Keys without a counterpart keep their names."""
    rename = _unet_renamer(tensors)
    return {rename(key): tensor for key, tensor in tensors.items()}


def vae_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Rename an `AutoencoderKL` or `VQModel` of diffusers to the class of the same name here.

    The linear layers of attention become 1x1 convolutions.
    """
    levels = len(_blocks_per_level(tensors, "decoder.up"))
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _vae_name(key, levels)
        renamed[name] = tensor[..., None, None] if _is_linear_projection(name, tensor) else tensor
    return renamed


def clip_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Rename a `CLIPTextModel`, in either of its two spellings, to a `FrozenCLIPEmbedder`."""
    return {f"transformer.text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}


def bert_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Rename the `LDMBertModel` of diffusers to a `BERTEmbedder`."""
    return {f"transformer.{_bert_name(key)}": tensor for key, tensor in tensors.items()}


def open_clip_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Rename the text tower of a `FrozenCLIPEmbedder` (keys begin with `embeddings.` or `encoder.`) to open_clip's.

    Separate projections of queries, keys and values are stacked.
    """
    renamed = {_apply_rules(key, CLIP_TO_OPEN_CLIP_RULES): tensor for key, tensor in tensors.items()}
    result = {key: tensor for key, tensor in renamed.items() if not STACKED.fullmatch(key)}
    stacks = dict.fromkeys(match.group(1, 3) for key in renamed if (match := STACKED.fullmatch(key)))
    for prefix, kind in stacks:
        keys = [f"{prefix}{letter}.{kind}" for letter in "qkv"]
        result[prefix + kind] = torch.cat([renamed[key] for key in keys if key in renamed])
    return result


def projected_clip_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Rename a `CLIPTextModelWithProjection`, in either of its two spellings, to a `FrozenOpenCLIPEmbedder2`.

    The projection of the pooled output is a linear layer there, and a matrix that multiplies from the right here.
    """
    tower = open_clip_tensors({key.removeprefix("text_model."): tensor for key, tensor in tensors.items()})
    projection = tower.pop("text_projection.weight", None)
    if projection is not None:
        tower["text_projection"] = projection.T
    return {f"model.{key}": tensor for key, tensor in tower.items()}


def clip_text_tensors(tensors: Tensors, keys: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of open_clip's text tower under the `keys` of a `CLIPTextModel`, the inverse conversion."""
    result: dict[str, Tensor] = {}
    for key in keys:
        name = _apply_rules(key, CLIP_TO_OPEN_CLIP_RULES)
        match = STACKED.fullmatch(name)
        if match:
            stack = tensors[match[1] + match[3]]
            tensor = stack.chunk(3)["qkv".index(match[2])]
        else:
            tensor = tensors[name]
        result[key] = tensor.clone()
    return result


def _unet_renamer(keys: Iterable[str]) -> Callable[[str], str]:
    """Return the function that renames a key of this U-Net."""
    keys = list(keys)
    down, up = _blocks_per_level(keys, "down"), _blocks_per_level(keys, "up")
    levels_with_attention = {key.split(".")[1] for key in keys if re.match(r"up_blocks\.\d+\.attentions\.", key)}

    def block_name(half: str, level: str, kind: str, index: str) -> str:
        number = int(level)
        # A downsampler is a block of its own, after the others of its level.
        if kind == "downsamplers":
            return f"input_blocks.{sum(down[:number + 1]) + number + 1}.0"
        # An upsampler is the last layer of its level's last block, after the attention if there is one.
        if kind == "upsamplers":
            return f"output_blocks.{sum(up[:number + 1]) - 1}.{1 + (level in levels_with_attention)}"
        # Residual blocks and their attention are the layers 0 and 1 of a block. The input half begins with conv_in and
        # has a downsampler per level.
        first = sum(down[:number]) + number + 1 if half == "down" else sum(up[:number])
        return f"{'input' if half == 'down' else 'output'}_blocks.{first + int(index)}.{int(kind == 'attentions')}"

    def rename(key: str) -> str:
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
            return f"{block_name(*match.groups()[:4])}.{_unet_layer_name(match[3], match[5])}"
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
            layer = 1 if match[1] == "attentions" else 2 * int(match[2])
            return f"middle_block.{layer}.{_unet_layer_name(match[1], match[3])}"
        return _replace_prefix(key, UNET_PREFIXES)

    return rename


def _unet_layer_name(kind: str, name: str) -> str:
    """Rename a weight within a block. Attention has the same names on both sides."""
    if kind == "downsamplers":
        return f"op.{name.removeprefix('conv.')}"
    return _replace_prefix(name, RESNET_PREFIXES) if kind == "resnets" else name


def _blocks_per_level(keys: Iterable[str], half: str) -> list[int]:
    """Return the number of residual blocks of each level of `half`, in the order of the levels."""
    pattern = re.compile(rf"{re.escape(half)}_blocks\.(\d+)\.resnets\.(\d+)\.")
    blocks = {match.groups() for key in keys if (match := pattern.match(key))}
    levels = [int(level) for level, _ in blocks]
    return [levels.count(level) for level in range(max(levels, default=-1) + 1)]


def _vae_name(key: str, levels: int) -> str:
    name = _apply_rules(key, VAE_RULES)
    return re.sub(r"(?<=decoder\.up\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)


def _is_linear_projection(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and re.search(r"attn[._]\d+\.(q|k|v|proj_out)\.weight$", name) is not None


def _bert_name(key: str) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match and match[2] in BERT_LAYER_NAMES:
        sublayer, name = BERT_LAYER_NAMES[match[2]]
        return f"attn_layers.layers.{2 * int(match[1]) + sublayer}.{name}.{match[3]}"
    return _replace_prefix(key, BERT_PREFIXES)


def _replace_prefix(key: str, prefixes: Mapping[str, str]) -> str:
    """Replace the first of the prefixes that `key` has."""
    for old, new in prefixes.items():
        if key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _apply_rules(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply regular-expression replacements in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
