"""Let the U-Net of a MODEL read packed prompts (see `edit`).

In every layer that reads text, an object patch of ComfyUI's model patcher wraps the `forward` of W_K and of W_V. The
wrapper splits a packed prompt, calls the original, and adds the concepts' outputs. An encoding of the usual width goes
to the original unchanged. This has several consequences:

* Values are exact in every layer, also where W_V is not invertible, and need no pseudo-inverse.
* The original keeps its business: LoRAs, casts of 8-bit weights and weights that are moved in when needed.
* Attention itself is not replaced, so that nodes which replace it, such as IP-Adapters, receive the edited keys and
  values.
* Patches belong to the clone of the model, and ComfyUI takes them off when another clone is used.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .concept_file import Concept, check_words
from .edit import Layout
from .errors import PerfusionError
from .sampling import SharedEdit

WRAPPED_CALL, WRAPPER_KEY = "outer_sample", "perfusion"  # a sampling run, in ComfyUI's names of wrappers
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}


class Constant:
    """A float32 tensor on the CPU, with a copy of the device and dtype that was needed last."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._copy = tensor

    def like(self, other: Tensor) -> Tensor:
        """Return the tensor with the device and dtype of another one."""
        if (self._copy.device, self._copy.dtype) != (other.device, other.dtype):
            self._copy = self.tensor.to(other)
        return self._copy


class EditedProjection:
    """The forward of W_K or W_V for packed prompts: W (x + g S) + g O, where x and the gates g are of the prompt.

    Args:
        original: the forward that it wraps.
        layout: of packed prompts.
        split: returns x and g of a packed prompt, `Layout.keys` or `Layout.values`.
        inputs: S, (J, d), i_super of concepts without an output of their own here; the row of others is 0.
        outputs: O, (J, p), o* of concepts with one; the row of others is 0.
    """

    def __init__(self, original: Callable[[Tensor], Tensor], layout: Layout,
                 split: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Tensor, outputs: Tensor) -> None:
        self.original = original
        self.layout = layout
        self.split = split
        self.inputs = Constant(inputs) if inputs.any() else None
        self.outputs = Constant(outputs) if outputs.any() else None

    def __call__(self, context: Tensor) -> Tensor:
        if context.shape[-1] == self.layout.width:
            return self.original(context)
        if context.shape[-1] != self.layout.packed_width:
            raise PerfusionError(self.layout.wrong_width(context))
        projected, gates = self.split(context)
        if self.inputs is not None:
            projected = projected + gates @ self.inputs.like(projected)
        output = self.original(projected)
        if self.outputs is not None:
            output = output + gates.to(output) @ self.outputs.like(output)
        return output


def model_with_concepts(model: Any, concepts: Sequence[Concept]) -> Any:
    """Return a clone of a MODEL whose U-Net reads prompts with these concepts, beside those that it has already.

    Raises:
        PerfusionError: a concept is of another base model, or has the word of another one.
    """
    earlier = model.get_wrappers(WRAPPED_CALL, WRAPPER_KEY)
    concepts = [*(earlier[0].concepts if earlier else ()), *concepts]
    check_words(concepts)
    layers = dict(_text_layers(model.model.diffusion_model))
    for concept in concepts:
        _check_fits(concept, layers)
    layout = Layout(len(concepts[0].target_input), len(concepts))

    edited = model.clone()
    edited.remove_wrappers_with_key(WRAPPED_CALL, WRAPPER_KEY)
    edited.add_wrapper_with_key(WRAPPED_CALL, WRAPPER_KEY, SharedEdit(concepts))
    for name, layer in layers.items():
        shape = (layer.to_v.out_features, layer.to_v.in_features)
        for projection, split, learned in (("to_k", layout.keys, [concept.outputs_k for concept in concepts]),
                                           ("to_v", layout.values, [concept.outputs_v for concept in concepts])):
            path = f"diffusion_model.{name}.{projection}.forward"
            original = model.get_model_object(path)
            original = original.original if isinstance(original, EditedProjection) else original
            inputs, outputs = _rows(name, concepts, learned, shape)
            edited.add_object_patch(path, EditedProjection(original, layout, split, inputs, outputs))
    return edited


def _rows(layer_name: str, concepts: Sequence[Concept], learned: Sequence[Mapping[str, Tensor]],
          shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return S (J, d) and O (J, p) of `EditedProjection` for one layer of W (p, d)."""
    inputs, outputs = torch.zeros(len(concepts), shape[1]), torch.zeros(len(concepts), shape[0])
    for index, (concept, of_concept) in enumerate(zip(concepts, learned, strict=True)):
        if layer_name in of_concept:
            outputs[index] = of_concept[layer_name]
        else:
            inputs[index] = concept.super_input
    return inputs, outputs


def _text_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attention layers that read text, with their names in the U-Net, which are those in concepts."""
    for name, block in unet.named_modules():
        if getattr(block, "attn2", None) is None or "time_stack" in name.split("."):
            continue
        if getattr(block, "disable_self_attn", False):
            yield f"{name}.attn1", block.attn1
        yield f"{name}.attn2", block.attn2


def _check_fits(concept: Concept, layers: Mapping[str, nn.Module]) -> None:
    """Raise PerfusionError if a concept is of another base model, as far as widths and names of layers tell."""
    width = len(concept.target_input)
    widths = {layer.to_v.in_features for layer in layers.values()}
    if not widths:
        raise PerfusionError(f"concept {concept.label}: this MODEL is not Stable Diffusion 1.x, 2.x or SDXL, or a "
                             "fine-tune of them; it has no cross-attention that these nodes know")
    if widths != {width}:
        raise PerfusionError(f"concept {concept.label} is of {_family(width)}, but this MODEL is of "
                             f"{_family(widths.pop())}; load a checkpoint of the concept's family")
    for name, output in (*concept.outputs_v.items(), *concept.outputs_k.items()):
        if name not in layers or layers[name].to_v.out_features != len(output):
            raise PerfusionError(f"concept {concept.label} does not fit this MODEL: they differ in layer {name}; load "
                                 "the checkpoint that it was trained on, or a fine-tune of it")


def _family(width: int) -> str:
    return f"{FAMILIES.get(width, 'another model')} (text width {width})"
