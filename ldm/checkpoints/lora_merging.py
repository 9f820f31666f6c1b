"""Add LoRAs to a model's weights.

A LoRA changes the weight W of a layer, (p, d) or a convolution's (p, d, k, k), to W + scale * alpha / r * delta with

    LoRA    delta = B A                      A, `lora_down` or `lora_A`, (r, d); B, `lora_up` or `lora_B`, (p, r)
    LoCon   delta = B M A                    with a convolution M, `lora_mid`, (r, r, k, k), between two 1x1 ones
    LoHa    delta = (B1 A1) * (B2 A2)        the product of elements; r is the rank of each
    LoKr    delta = kron(W1, W2)             each whole, or a product of its own
    full    delta                            `diff`, for norms `w_norm`
    DoRA    any of these; the result's columns or rows then get the stored norms, `dora_scale`

Sources: Hu et al., "LoRA" (ICLR 2022, arXiv 2106.09685); Yeh et al., "Navigating Text-To-Image Customization: From
LyCORIS Fine-Tuning to Model Evaluation" (ICLR 2024, arXiv 2309.14859); Liu et al., "DoRA" (ICML 2024, arXiv
2402.09353).
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoints.families import family_of_width
from ldm.checkpoints.lora_file import AGAIN, Lora, LoraLayer
from ldm.checkpoints.lora_names import UNET, Layer, Place
from ldm.checkpoints.pickled import printable
from ldm.common.errors import UserError

FULL = ("diff", "w_norm")
BIASES = ("diff_b", "b_norm")
NORMS = {"dora_scale", "magnitude_vector"}  # of LyCORIS and PEFT


def merge_lora(lora: Lora, model: Mapping[Place, Layer], scale: float = 1.0) -> Counter[str]:
    """Add a LoRA to the weights of a model, in place. A model that this raises for is to be discarded.

    Args:
        lora: what `load_lora` returned.
        model: all layers of the model, from `ldm.checkpoints.lora_names.name_layers`.
        scale: how much of it to add; 1 is as it was trained.

    Returns:
        network -> number of layers that were changed.

    Raises:
        UserError: the LoRA was made for another kind of model, or is damaged.
    """
    known = {place: layer for place, layer in lora.layers.items() if place in model}
    if not known:
        raise UserError(f"{lora.path}: is a LoRA for {_other(lora.base, model)}, of which no layer is in "
                        f"{_own_family(model)}; choose one that was made for this model's family")
    for place, layer in known.items():
        _merge_layer(lora, layer, model[place], scale, model)
    return Counter(place.network for place in known)


def unmatched_names(lora: Lora, model: Mapping[Place, Layer]) -> list[str]:
    """Return the names in a LoRA file that no layer of the model has."""
    return [*(layer.name for place, layer in lora.layers.items() if place not in model), *lora.unknown]


def _merge_layer(lora: Lora, layer: LoraLayer, target: Layer, scale: float, model: Mapping[Place, Layer]) -> None:
    try:
        delta = compute_delta(layer)
    except (KeyError, RuntimeError, IndexError):
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in layer.parts.items())
        raise UserError(f"{lora.path}: is damaged at {printable(layer.name)}, whose parts do not fit together "
                        f"({shapes}); {AGAIN}") from None
    if delta is not None:
        if delta.numel() != target.weight.numel() or len(delta) != len(target.weight):
            raise UserError(f"{lora.path}: is a LoRA for {_other(lora.base, model)}, which does not fit "
                            f"{_own_family(model)}: {printable(layer.name)} is {tuple(delta.shape)} there and "
                            f"{tuple(target.weight.shape)} here; choose one that was made for this model's family")
        weight = target.weight.float()
        delta = delta.to(weight.device).reshape(weight.shape)
        target.weight.copy_(weight + scale * (_with_norms(weight + delta, layer.parts) - weight)
                            if layer.parts.keys() & NORMS else weight + scale * delta)
    bias = next((layer.parts[part] for part in BIASES if part in layer.parts), None)
    if bias is not None and target.bias is not None:
        target.bias.add_(scale * bias.to(target.bias))


def compute_delta(layer: LoraLayer) -> Tensor | None:
    """Return what a layer of a LoRA adds to the weight, with alpha; None if it changes the bias alone.

    Raises:
        KeyError, RuntimeError: parts are missing or do not fit together.
    """
    parts = layer.parts
    full = next((parts[part] for part in FULL if part in parts), None)
    if full is not None:
        return full
    if "down" in parts or "up" in parts:
        return _scale(layer, len(parts["down"])) * _product(parts["up"], parts["down"], parts.get("mid"))
    if any(part.startswith("hada") for part in parts):
        return _scale(layer, len(parts["hada_w1_b"])) * (
            _factored(parts, "hada_w1", "hada_t1") * _factored(parts, "hada_w2", "hada_t2"))
    if any(part.startswith("lokr") for part in parts):
        return _kronecker(layer)
    if any(part in parts for part in BIASES):
        return None
    raise KeyError(layer.name)


def _scale(layer: LoraLayer, rank: int) -> float:
    return 1.0 if layer.alpha is None else layer.alpha / rank ** layer.rank_exponent


def _product(up: Tensor, down: Tensor, mid: Tensor | None) -> Tensor:
    """Return B A, or B M A, as (p, d) or (p, d, k, k)."""
    if mid is not None:
        return torch.einsum("pr,rskl,sd->pdkl", up.flatten(1), mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def _factored(parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """Return one factor of LoHa or LoKr: a product, or with a convolution in its middle (Tucker)."""
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return torch.einsum("srkl,sp,rd->pdkl", parts[core], first, second)
    return first @ second


def _kronecker(layer: LoraLayer) -> Tensor:
    parts, rank = layer.parts, None
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append(parts[name])
        else:
            factors.append(_factored(parts, name, "lokr_t2" if name == "lokr_w2" else ""))
            rank = len(parts[f"{name}_b"])
    left, right = factors
    left = left.reshape(*left.shape, *[1] * (right.ndim - left.ndim))
    return (1.0 if rank is None else _scale(layer, rank)) * torch.kron(left, right)


def _with_norms(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return a weight whose rows, or columns in LyCORIS's older files, have the stored norms (DoRA)."""
    norms = parts.get("magnitude_vector", parts.get("dora_scale"))
    by_row = "magnitude_vector" in parts or norms.ndim == 1 or len(norms) == len(weight)
    flat = weight.flatten(1) if by_row else weight.transpose(0, 1).flatten(1)
    factor = norms.to(weight.device).flatten() / flat.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    shape = (-1, *[1] * (weight.ndim - 1)) if by_row else (1, -1, *[1] * (weight.ndim - 2))
    return weight * factor.view(shape)


# Messages


def _own_family(model: Mapping[Place, Layer]) -> str:
    width = next((layer.weight.shape[1] for place, layer in model.items()
                  if place.network == UNET and place.name.endswith("attn2_to_k")), None)
    return "this model" if width is None else family_of_width(width).name


def _other(base: str, model: Mapping[Place, Layer]) -> str:
    """Return the kind of model of a LoRA, or "another model" if it seems to be this one's."""
    return f"another fine-tune or size of {base}" if base == _own_family(model) else base
