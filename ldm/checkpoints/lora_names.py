"""Match the names of layers in LoRA files to the layers of a model.

Files name a layer in several ways, here `input_blocks.1.1.transformer_blocks.0.attn2.to_k` of a U-Net:

    lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k              kohya, as CompVis and sgm (SDXL)
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k    kohya, as diffusers
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k         PEFT and diffusers
    down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k    diffusers before PEFT
    lora_te1_text_model_encoder_layers_0_self_attn_q_proj                   text encoders

All become a `Place`: the network, and the layer's name with underscores in place of dots.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.checkpoints.diffusers_names import CLIP_TO_OPEN_CLIP_RULES, RESNET_PREFIXES, UNET_PREFIXES

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
PREFIXES = (  # of names in files, and the network that each stands for
    (r"lora_unet_|lycoris_(?!text)|unet\.(base_model\.model\.)?|(model\.)?diffusion_model\.|base_model\.model\.", UNET),
    (r"lora_te1?_|text_encoder\.(base_model\.model\.)?|text_encoders\.clip_[lh]\.transformer\.", TEXT_ENCODERS[0]),
    (r"lora_te2_|text_encoder_2\.(base_model\.model\.)?|text_encoders\.clip_g\.transformer\.", TEXT_ENCODERS[1]),
    (r"(?=(down|up)_blocks\.|mid_block\.)", UNET),
)
OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # in text encoders
BLOCK = re.compile(r"((?:input|output)_blocks\.\d+\.\d+)\.(.+)")
RESNET_NAMES = {ours: theirs for theirs, ours in RESNET_PREFIXES.items()}
SINGLE_NAMES = {ours: theirs for theirs, ours in UNET_PREFIXES.items()} | {
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}


class Place(NamedTuple):
    """A layer of a network: `UNET` or one of `TEXT_ENCODERS`, and the layer's name, with underscores for dots."""

    network: str
    name: str


class Layer(NamedTuple):
    """The parameters of a layer, or views of them, which a LoRA changes in place. A layer may have no bias."""

    weight: Tensor
    bias: Tensor | None = None


def place_of(name: str) -> Place | None:
    """Return the layer that a name in a file stands for; None if the name is of no known notation."""
    for pattern, network in PREFIXES:
        if match := re.match(pattern, name):
            flat = name[match.end():].replace(".processor", "").replace(".", "_")
            return Place(network, _modern_name(network, flat))
    return None


def _modern_name(network: str, flat: str) -> str:
    """Return a name in the spelling of today's diffusers and transformers."""
    if network == UNET:
        return f"{flat}_0" if flat.endswith("_to_out") else flat
    flat = flat.removeprefix("text_model_")
    start, separator, end = flat.partition("self_attn_")
    return start + separator + OLD_ATTENTION.get(end, end)


def name_layers(unet: nn.Module, towers: Iterable[nn.Module]) -> dict[Place, Layer]:
    """Return all layers of a model that a LoRA may change. A layer of the U-Net has two names.

    Args:
        unet: the U-Net.
        towers: the text encoders, `FrozenCLIPEmbedder` or `FrozenOpenCLIPEmbedder`, in their order.
    """
    parameters = {name: parameter.data for name, parameter in unet.named_parameters()}
    layers = {}
    for ours, theirs in diffusers_names(parameters).items():
        layer = Layer(parameters[f"{ours}.weight"], parameters.get(f"{ours}.bias"))
        layers |= {Place(UNET, name.replace(".", "_")): layer for name in (ours, theirs)}
    for network, tower in zip(TEXT_ENCODERS, towers, strict=False):
        layers |= {Place(network, name.replace(".", "_")): layer for name, layer in _tower_layers(tower).items()}
    return layers


def _tower_layers(tower: nn.Module) -> dict[str, Layer]:
    """Return the layers of a text tower by the names of transformers, without `text_model.`."""
    if getattr(tower, "model", None) is not None:
        return _open_clip_layers(tower.model)
    parameters = {name.removeprefix("text_model."): parameter.data
                  for name, parameter in getattr(tower, "transformer", nn.Module()).named_parameters()}
    return {name: Layer(parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))
            for name in _layer_names(parameters)}


def _open_clip_layers(model: Any) -> dict[str, Layer]:
    """Return the layers of a text tower of open_clip, which stacks the projections of queries, keys and values."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}

    def layer(start: str, rows: slice = slice(None)) -> Layer:
        bias = parameters.get(f"{start}bias")
        return Layer(parameters[f"{start}weight"][rows], None if bias is None else bias[rows])

    layers = {}
    for index in range(len(model.transformer.resblocks)):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1",
                     "mlp.fc2", "layer_norm1", "layer_norm2"):
            name = f"encoder.layers.{index}.{part}"
            start = f"{name}."
            for pattern, replacement in CLIP_TO_OPEN_CLIP_RULES:
                start = re.sub(pattern, replacement, start)
            if stacked := re.fullmatch(r"(.*in_proj_)([qkv])\.", start):
                first, width = "qkv".index(stacked[2]), model.ln_final.weight.shape[0]
                layers[name] = layer(stacked[1], slice(first * width, (first + 1) * width))
            else:
                layers[name] = layer(start)
    layers["final_layer_norm"] = layer("ln_final.")
    projection = parameters.get("text_projection")
    if projection is not None:
        layers["text_projection"] = Layer(projection.T)  # x @ P here, a linear layer in transformers
    return layers


def diffusers_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a `UNetModel`'s layers in diffusers' `UNet2DConditionModel`, by their names here.

    Layers without a counterpart keep their names.

    Args:
        keys: the parameters of the U-Net by name.
    """
    blocks = _diffusers_blocks(keys)
    names = {}
    for name in _layer_names(keys):
        match = BLOCK.match(name)
        start, rest = match.groups() if match else ("", "")
        if middle := re.match(r"middle_block\.(\d)\.(.+)", name):
            names[name] = f"{MIDDLE.get(middle[1], name)}.{RESNET_NAMES.get(middle[2], middle[2])}"
        elif start in blocks:
            names[name] = f"{blocks[start]}.{'conv' if rest == 'op' else RESNET_NAMES.get(rest, rest)}"
        else:
            names[name] = SINGLE_NAMES.get(name, name)
    return names


def _layer_names(keys: Iterable[str]) -> list[str]:
    return [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]


def _diffusers_blocks(keys: Iterable[str]) -> dict[str, str]:
    """Return diffusers' name of each block that is a residual block, a transformer or a resampling layer."""
    contents: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        if match := BLOCK.match(key):
            contents[match[1]].add(match[2].split(".")[0])
    names = {}
    level = index = 0
    half, number = "input", "0"  # block 0 is the first convolution
    for start in sorted(contents, key=lambda name: (name.split("_")[0], [int(part) for part in name.split(".")[1:]])):
        current_half, current_number = start.split("_")[0], start.split(".")[1]
        if current_half != half:
            half, number, level, index = current_half, current_number, 0, 0
        elif current_number != number:
            number, index = current_number, index + (number != "0" or half == "output")
        side = "down" if half == "input" else "up"
        if contents[start] & {"op", "conv"}:  # the last layer of its level
            names[start] = f"{side}_blocks.{level}.{side}samplers.0"
            level, index = level + 1, -1
        elif "in_layers" in contents[start]:
            names[start] = f"{side}_blocks.{level}.resnets.{index}"
        elif "proj_in" in contents[start]:
            names[start] = f"{side}_blocks.{level}.attentions.{index}"
    return names
