"""Check what a concept file says and holds, before it is used or written. See `ldm.concepts.concept_file`.

Each function returns what is wrong and the remedy, or None. Contents are those of file format 4, with the index of its
concept before every tensor's name.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ldm.concepts.concept import POOLED
from ldm.concepts.file_tensors import DUAL, find_invalid_numbers, split_by_index, tensors_under
from ldm.concepts.placeholders import find_duplicate, is_placeholder
from ldm.modules.rank_one import PROJECTIONS

VECTORS = ("target_input", "super_input")
LAYER_OUTPUTS = {"target_output_v": "target_outputs_v", "target_output_k": "target_outputs_k"}  # in files: in `Concept`
SETTINGS: dict[str, type | tuple[type, ...]] = {
    "placeholder": str,
    "super_category": str,
    "word_parts": list,
    "bias": (int, float),
    "temperature": (int, float),
    "projection": str,
    "used_layers": list,
    "pooled": str,
    "steps": int,
    "base": str,
}
ENERGY = "target_energy"
OPTIONAL_TEXTS = ("base_name", "base_samples", "date", "resolution", "prediction_type")
MOST_NAME = 100  # characters of a placeholder in messages
MOST_TEXT = {"base_samples": 20_000}  # characters of a setting; the samples of SDXL's 70 layers take 3,000
MOST_TEXT_ELSEWHERE = 1_000
DUAL_TOLERANCE = 1e-3  # relative; the product of the stored tensors is exact up to the order of its sum
WORD_PART = re.compile(r"[a-z][a-z0-9_]{0,31}")


def find_problem(settings: Sequence[object], tensors: Mapping[str, Tensor]) -> str | None:
    """Check the contents of a file.

    Args:
        settings: of each concept.
        tensors: all of the file.
    """
    if not settings:
        return "no concept in it; train one or name another file"
    by_index = split_by_index(tensors)
    indices = [str(index) for index in range(len(settings))]

    # Each concept by itself.
    for index, values in zip(indices, settings, strict=True):
        own = by_index.get(index, {})
        problem = (_settings_problem(values) or _tensors_problem(own, values["word_parts"])
                   or _layers_problem(values["used_layers"], own) or _dual_problem(values, own))
        if problem:
            name = values.get("placeholder", index) if isinstance(values, dict) else index
            return f"concept {str(name)[:MOST_NAME]}: {problem}"

    # The file as a whole.
    known = {index: values["word_parts"] for index, values in zip(indices, settings, strict=True)}
    for name in tensors:
        if not _is_known_tensor(name, known):
            return f"holds {name}, which belongs to no concept in it; copy or train it again"
    duplicate = find_duplicate([values["placeholder"] for values in settings])
    if duplicate is not None:
        return f"several concepts are called {duplicate} (case is ignored); give each its own placeholder"
    if not _share_shapes(by_index.values()) or len({values["base"] for values in settings}) > 1:
        return "its concepts belong to different base models; save them to separate files"
    return None


def _share_shapes(concepts: Iterable[Mapping[str, Tensor]]) -> bool:
    """Return whether tensors of one name have one shape in all concepts. A concept may lack some, such as layers."""
    shapes: dict[str, object] = {}
    return all(shapes.setdefault(name, tensor.shape) == tensor.shape
               for tensors in concepts for name, tensor in tensors.items())


def _settings_problem(values: object) -> str | None:
    if not isinstance(values, dict):
        return "its settings are damaged; copy or train it again"
    for name, kind in SETTINGS.items():
        if not isinstance(values.get(name), kind) or isinstance(values[name], bool):
            return f"its {name} is missing or of the wrong type; copy or train it again"
    for name, value in values.items():  # also of settings that this version does not know
        most = MOST_TEXT.get(name, MOST_TEXT_ELSEWHERE)
        if isinstance(value, str) and len(value) > most:
            return f"its {name} has {len(value):,} characters, more than {most:,}; copy or train it again"
    if not is_placeholder(values["placeholder"]):
        return "its placeholder must be a word without white space; give it another"
    if not _is_finite(values["bias"]):
        return f"its bias is {values['bias']}; give it a number, such as 0.75"
    if not (_is_finite(values["temperature"]) and values["temperature"] > 0):
        return f"its temperature is {values['temperature']}; give it a number above 0, such as 0.1"
    if values["projection"] not in PROJECTIONS:
        return f"its projection {values['projection']!r} is not one of {', '.join(PROJECTIONS)}; train it again"
    if values["pooled"] not in POOLED:
        return f"its pooled {values['pooled']!r} is not one of {', '.join(POOLED)}; train it again"
    if not _are_word_parts(values["word_parts"]):
        return "its word_parts are no names of text encoders; copy or train it again"
    if ENERGY in values and not _is_energy(values[ENERGY]):
        return f"its {ENERGY} {values[ENERGY]!r} is not a number above 0; train it again"
    for name in OPTIONAL_TEXTS:
        if not isinstance(values.get(name, ""), str):
            return f"its {name} is no text; copy or train it again"
    return None


def _are_word_parts(names: Sequence[object]) -> bool:
    are_names = all(isinstance(name, str) and WORD_PART.fullmatch(name) for name in names)
    return are_names and len(set(names)) == len(names) > 0 and not {*VECTORS, DUAL} & set(names)


def _is_energy(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value) and value > 0


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _tensors_problem(tensors: Mapping[str, Tensor], word_parts: Sequence[str]) -> str | None:
    missing = [name for name in (*word_parts, *VECTORS) if name not in tensors]
    values, keys = (tensors_under(f"{name}.", tensors) for name in LAYER_OUTPUTS)
    if missing or not values:
        return f"{', '.join(missing) or 'target_output_v'} is missing; copy or train it again"
    for part in word_parts:
        if tensors[part].ndim != 2 or len(tensors[part]) != 1:
            return f"its word {part} must be one vector, not of shape {tuple(tensors[part].shape)}; train it again"
    target_input, super_input = (tensors[name] for name in VECTORS)
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


def _dual_problem(settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str | None:
    """Check that the dual, if there is one, can be that of the target input: dual . i* = ||i*||^2."""
    dual, target_input = tensors.get(DUAL), tensors["target_input"]
    if dual is None:
        return None
    if dual.shape != target_input.shape:
        return (f"its dual must be of the size of its target_input, {tuple(target_input.shape)}, not "
                f"{tuple(dual.shape)}; copy or train it again")
    energy = dual_energy(tensors)
    expected = settings.get(ENERGY, energy)
    if not (energy > 0 and abs(energy - expected) <= DUAL_TOLERANCE * expected):
        known = f"{expected:.4g}" if ENERGY in settings else "above 0"
        return (f"its dual is that of another target_input: their product is {energy:.4g} and should be {known}; copy "
                "or train it again")
    return None


def dual_energy(tensors: Mapping[str, Tensor]) -> float:
    """Return dual . i* of a concept's tensors in a file, in float64."""
    return float(tensors[DUAL].double() @ tensors["target_input"].double())


def _layers_problem(used_layers: Sequence[object], tensors: Mapping[str, Tensor]) -> str | None:
    for layer in used_layers:
        if f"target_output_v.{layer}" not in tensors:
            return f"it uses layer {str(layer)[:MOST_NAME]}, but has no target output for it; train it again"
    return None


def _is_known_tensor(full_name: str, word_parts: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a tensor belongs to a concept, given the word parts of each by index."""
    index, _, name = full_name.partition(".")
    prefixes = tuple(f"{stored_name}." for stored_name in LAYER_OUTPUTS)
    return index in word_parts and (name in (*VECTORS, DUAL, *word_parts[index]) or name.startswith(prefixes))
