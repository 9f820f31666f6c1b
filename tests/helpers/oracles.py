"""State dicts of our U-Nets with the names of diffusers' independent implementation."""
from __future__ import annotations

import re

import torch
from torch import Tensor, nn

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}
ENDS = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}
SELF_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def randomize(module: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Fill every parameter with noise, so that no branch is zero; weights of norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            around_one = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if around_one else noise)
    return module


def diffusers_unet_state(state: dict[str, Tensor], num_res_blocks: int) -> dict[str, Tensor]:
    """Rename the state dict of a UNetModel with spatial transformers for `UNet2DConditionModel`."""
    return {_diffusers_name(key, num_res_blocks): tensor for key, tensor in state.items()}


def diffusers_self_attention_state(
    state: dict[str, Tensor], num_res_blocks: int, head_width: int
) -> dict[str, Tensor]:
    """Convert the state dict of a UNetModel with attention blocks for `UNet2DModel`.

    Diffusers has linear layers instead of our 1x1 convolutions, and separate q, k, v instead of one stack per head.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        path = _diffusers_name(key, num_res_blocks)
        tensor = value.squeeze(-1) if value.ndim == 3 else value
        block, _, rest = path.rpartition("attentions.")
        index, name, kind = rest.split(".") if block else ("", "", "")
        if name == "qkv":
            per_head = tensor.view(-1, 3, head_width, *tensor.shape[1:])
            renamed |= {path.replace("qkv", f"to_{x}"): per_head[:, i].flatten(0, 1) for i, x in enumerate("qkv")}
        else:
            renamed[f"{block}attentions.{index}.{SELF_ATTENTION[name]}.{kind}" if block else path] = tensor
    return renamed


def _diffusers_name(key: str, per_level: int) -> str:
    for ours, theirs in ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    if middle := re.match(r"middle_block\.(\d)\.(.*)", key):
        position = int(middle[1])
        kind = "attentions.0" if position == 1 else f"resnets.{position // 2}"
        return f"mid_block.{kind}.{_inner(middle[2])}"
    half, block, layer, rest = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", key).groups()
    if half == "input":
        level, index = divmod(int(block) - 1, per_level + 1)
        path = f"down_blocks.{level}"
    else:
        level, index = divmod(int(block), per_level + 1)
        path = f"up_blocks.{level}"
    if rest.startswith("op."):
        return f"{path}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{path}.upsamplers.0.{rest}"
    return f"{path}.{'resnets' if layer == '0' else 'attentions'}.{index}.{_inner(rest)}"


def _inner(rest: str) -> str:
    for ours, theirs in RESNET.items():
        if rest.startswith(ours + "."):
            return theirs + rest.removeprefix(ours)
    return rest
