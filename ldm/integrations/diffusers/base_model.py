"""What a pipeline's base model is, in this project's terms: names of layers, and the fingerprint of their weights."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ldm.checkpoints.diffusers_names import unet_tensors
from ldm.common.errors import UserError
from ldm.concepts.fingerprint import BaseModel, checkpoint_name
from ldm.integrations.diffusers.words import Tower


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def check_pipeline(pipe: Any) -> None:
    """Raise UserError if a pipeline is not one of Stable Diffusion's kind."""
    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"concepts are loaded into a pipeline of diffusers, not a {type(pipe).__name__}; give the "
                        "pipeline")
    unet = getattr(pipe, "unet", None)
    reads_clip = callable(getattr(pipe, "encode_prompt", None)) and bool(Tower.all_of(pipe))
    if unet is None or not isinstance(uncompiled(unet), UNet2DConditionModel) or not reads_clip:
        raise UserError(f"{type(pipe).__name__} is not a pipeline of Stable Diffusion 1, 2 or XL with its text "
                        "encoders, and concepts work with no other; load one of these")


def ldm_layer_names(unet: nn.Module, layers: dict[str, Attention]) -> dict[str, str]:
    """Return the name that each layer has in concept files, by its path in the U-Net of diffusers."""
    paths = {f"{path}.weight": path for path in layers}
    names = {name: name for name, _ in unet.named_parameters()}  # they tell the number of blocks of each level
    renamed = unet_tensors(names | paths)
    return {path: name.removesuffix(".weight") for name, path in renamed.items() if path in layers}


def describe_base(pipe: DiffusionPipeline, layers: dict[str, Attention]) -> BaseModel:
    """Return what identifies a pipeline's base model.

    Args:
        layers: name in concept files -> layer.
    """
    checkpoint = pipe.config.get("_name_or_path") or None
    projections: dict[str, Any] = {}
    for name, layer in layers.items():
        projections[name] = SimpleNamespace(to_k=_readable(layer.to_k), to_v=_readable(layer.to_v))
    weights = [getattr(pair, key).weight for pair in projections.values() for key in ("to_k", "to_v")]
    if all(weight.is_floating_point() for weight in weights):
        return BaseModel.of(projections, checkpoint)
    # Quantized weights identify nothing.
    shapes = {name: (layer.to_v.out_features, layer.to_v.in_features) for name, layer in layers.items()}
    return BaseModel("", checkpoint_name(checkpoint), layers=shapes)


def _readable(projection: nn.Module) -> SimpleNamespace:
    """Return an object with the weight of a linear layer, without its LoRA, and also if the weight is offloaded."""
    base = getattr(projection, "base_layer", projection)
    if base.weight.device.type != "meta":
        return SimpleNamespace(weight=base.weight.detach())
    from accelerate.utils import align_module_device

    with align_module_device(base, "cpu"):
        return SimpleNamespace(weight=base.weight.detach().clone())
