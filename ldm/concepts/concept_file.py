"""The file format of Perfusion's concepts: load, save and check.

File format 3 (safetensors). Metadata key `perfusion`, JSON:

    {"format_version": 3, "concepts": [{"placeholder", "super_category", "bias", "temperature", "projection",
                                        "used_layers", "steps", "base", and optionally "target_energy", "base_name",
                                        "base_samples"}, ...]}

Tensors of the concept at index n of that list:

    n.embedding                 (1, width)  learned word embedding v of the placeholder
    n.target_input              (d,)        i*
    n.super_input               (d,)        i_super
    n.target_output_v.<layer>   (p,)        o*_V of that cross-attention layer
    n.target_output_k.<layer>   (p,)        o*_K, only if keys were trained; otherwise locked: o*_K = W_K i_super

Earlier formats still load. Format 2 has no `used_layers`: all layers are used. Format 1 has no `projection` either:
all projections are full. A file with a single concept is a merge of one. For Stable Diffusion 1.5 a concept in float16
takes 32 KB. Symbols as in `ldm.modules.rank_one`.
"""
from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.concepts.concept import Concept
from ldm.concepts.file_tensors import find_invalid_numbers, split_by_index, tensors_to_store, tensors_under
from ldm.concepts.placeholders import find_duplicate, is_placeholder
from ldm.modules.rank_one import PROJECTIONS

FORMAT_VERSION = 3
METADATA_KEY = "perfusion"
VECTORS = ("embedding", "target_input", "super_input")
LAYER_OUTPUTS = {"target_output_v": "target_outputs_v", "target_output_k": "target_outputs_k"}  # in files: in `Concept`
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "placeholder": str,
    "super_category": str,
    "bias": (int, float),
    "temperature": (int, float),
    "projection": str,
    "used_layers": list,
    "steps": int,
    "base": str,
}
# Optional settings; older versions ignore them and read the rest
ENERGY = "target_energy"
BASE_TEXTS = ("base_name", "base_samples")
ADDED_SETTINGS = ((2, "projection", "full"), (3, "used_layers", []))  # format that added it, name, earlier meaning


def save_perfusion_concepts(
    path: str | Path, concepts: Sequence[Concept], precision: torch.dtype | None = torch.float16
) -> Path:
    """Write concepts to one file. The file is complete or not written at all.

    Args:
        path: the file; an existing one is replaced.
        concepts: at least one, all trained on the same base model.
        precision: dtype of the tensors. float16 keeps files small without a visible loss. None: float16 if that
            changes no number, else float32, so that concepts loaded from files are saved bit for bit.

    Raises:
        UserError: the file could not be loaded again, for example because training diverged.
    """
    tensors = tensors_to_store(concepts, precision)
    settings = []
    for concept in concepts:
        values = {name: getattr(concept, name) for name in SETTINGS}
        if concept.target_energy is not None:
            values[ENERGY] = concept.target_energy
        values |= {name: getattr(concept, name) for name in BASE_TEXTS if getattr(concept, name)}
        settings.append(values)
    _check_contents(path, settings, tensors)
    metadata = {METADATA_KEY: {"format_version": FORMAT_VERSION, "concepts": settings}}
    return save_tensors(path, tensors, metadata)


def load_perfusion_concepts(path: str | Path) -> list[Concept]:
    """Load the concepts of a file, in its order, as float32 on the CPU.

    Raises:
        UserError: the file is missing, cut off, not a concept file or from a later version of this project; or its
            contents are incomplete, inconsistent or not finite.
    """
    tensors, metadata = load_tensors(path)

    # Read the header.
    header = metadata.get(METADATA_KEY)
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise UserError(f"{path}: a safetensors file, but not a concept; give a file that training a concept has made")
    version = header["format_version"]
    if version > FORMAT_VERSION:
        raise UserError(f"{path}: concept format {version}, this version reads up to {FORMAT_VERSION}; update it")
    settings = header.get("concepts")
    if not isinstance(settings, list):
        raise UserError(f"{path}: damaged, it lists no concepts; copy or train it again")

    # Add the settings that formats before this one do not have.
    added = {name: value for since, name, value in ADDED_SETTINGS if since > version}
    settings = [{**values, **added} if isinstance(values, dict) else values for values in settings]

    _check_contents(path, settings, tensors)
    by_index = split_by_index(tensors)
    return [_build_concept(path, values, by_index[str(index)]) for index, values in enumerate(settings)]


def _build_concept(path: str | Path, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Concept:
    """Return a concept from its settings and tensors, which are checked already."""
    outputs = {}
    for stored_name, attribute in LAYER_OUTPUTS.items():
        by_layer = tensors_under(f"{stored_name}.", tensors)
        outputs[attribute] = {layer: output.float() for layer, output in by_layer.items()}
    return Concept(
        **{name: settings[name] for name in SETTINGS},
        **{name: tensors[name].float() for name in VECTORS},
        **outputs,
        target_energy=settings.get(ENERGY),
        **{name: settings.get(name, "") for name in BASE_TEXTS},
        source=str(path),
    )


# Checks. Each returns what is wrong and the remedy, or None.


def _check_contents(path: str | Path, settings: Sequence[object], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if the contents of a concept file are not valid."""
    problem = _find_problem(settings, tensors)
    if problem is not None:
        raise UserError(f"{path}: {problem}")


def _find_problem(settings: Sequence[object], tensors: Mapping[str, Tensor]) -> str | None:
    if not settings:
        return "no concept in it; train one or name another file"
    by_index = split_by_index(tensors)
    indices = [str(index) for index in range(len(settings))]

    # Each concept by itself.
    for index, values in zip(indices, settings, strict=True):
        own = by_index.get(index, {})
        problem = _settings_problem(values) or _tensors_problem(own) or _layers_problem(values["used_layers"], own)
        if problem:
            name = values.get("placeholder", index) if isinstance(values, dict) else index
            return f"concept {name}: {problem}"

    # The file as a whole.
    known = set(indices)
    for name in tensors:
        if not _is_known_tensor(name, known):
            return f"holds {name}, which belongs to no concept in it; copy or train it again"
    duplicate = find_duplicate([values["placeholder"] for values in settings])
    if duplicate is not None:
        return f"several concepts are called {duplicate} (case is ignored); give each its own placeholder"
    shapes = [_base_shapes(by_index[index]) for index in indices]
    if any(one != shapes[0] for one in shapes) or len({values["base"] for values in settings}) > 1:
        return "its concepts belong to different base models; save them to separate files"
    return None


def _base_shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes that the base model determines. Keys are left out: a file may mix trained and locked keys."""
    return {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("target_output_k.")}


def _settings_problem(values: object) -> str | None:
    if not isinstance(values, dict):
        return "its settings are damaged; copy or train it again"
    for name, kind in SETTINGS.items():
        if not isinstance(values.get(name), kind) or isinstance(values[name], bool):
            return f"its {name} is missing or of the wrong type; copy or train it again"
    if not is_placeholder(values["placeholder"]):
        return "its placeholder must be a word without white space; give it another"
    if not _is_finite(values["bias"]):
        return f"its bias is {values['bias']}; give it a number, such as 0.75"
    if not (_is_finite(values["temperature"]) and values["temperature"] > 0):
        return f"its temperature is {values['temperature']}; give it a number above 0, such as 0.1"
    if values["projection"] not in PROJECTIONS:
        return f"its projection {values['projection']!r} is not one of {', '.join(PROJECTIONS)}; train it again"
    if ENERGY in values and not _is_energy(values[ENERGY]):
        return f"its {ENERGY} {values[ENERGY]!r} is not a number above 0; train it again"
    if not all(isinstance(values.get(name, ""), str) for name in BASE_TEXTS):
        return "the description of its base model is damaged; copy or train it again"
    return None


def _is_energy(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value) and value > 0


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _tensors_problem(tensors: Mapping[str, Tensor]) -> str | None:
    missing = [name for name in VECTORS if name not in tensors]
    values, keys = (tensors_under(f"{name}.", tensors) for name in LAYER_OUTPUTS)
    if missing or not values:
        return f"{', '.join(missing) or 'target_output_v'} is missing; copy or train it again"
    embedding, target_input, super_input = (tensors[name] for name in VECTORS)
    if embedding.ndim != 2 or len(embedding) != 1:
        return f"its embedding must be one vector, not of shape {tuple(embedding.shape)}; train it again"
    if target_input.ndim != 1 or super_input.shape != target_input.shape:
        shapes = tuple(target_input.shape), tuple(super_input.shape)
        return (f"its target_input and super_input must be vectors of one size, not {shapes[0]} and {shapes[1]}; "
                "train it again")
    if keys and set(keys) != set(values):
        return f"trained keys but no values, or the reverse, in layer {min(set(keys) ^ set(values))}; train it again"
    for layer, output in values.items():
        if output.ndim != 1 or keys.get(layer, output).shape != output.shape:
            return f"its target outputs of layer {layer} do not fit together; copy or train it again"
    problem = find_invalid_numbers(tensors)
    if problem is None and not target_input.any():
        return "its target_input is zero, which is not a direction; copy or train it again"
    return problem


def _layers_problem(used_layers: Sequence[object], tensors: Mapping[str, Tensor]) -> str | None:
    for layer in used_layers:
        if f"target_output_v.{layer}" not in tensors:
            return f"it uses layer {layer}, but has no target output for it; train it again"
    return None


def _is_known_tensor(full_name: str, indices: Container[str]) -> bool:
    index, _, name = full_name.partition(".")
    prefixes = tuple(f"{stored_name}." for stored_name in LAYER_OUTPUTS)
    return index in indices and (name in VECTORS or name.startswith(prefixes))
