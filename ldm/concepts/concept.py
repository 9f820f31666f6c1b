"""A learned concept as a value: kept in a file of some 30 KB, checked, merged with others, handed to the edit.

File format 3 (safetensors). Metadata key `perfusion`, JSON: {"format_version": 3, "concepts": [{"placeholder",
"super_category", "bias", "temperature", "projection", "used_layers", "steps", "base"}, ...]}. Format 2 knows no used
layers: all are used. Format 1 knows no projection either: all are full. In any format a concept may have a
"target_energy". Tensors of the concept at position n of that list:

    n.embedding                 (1, width)  learned word embedding v of the placeholder
    n.target_input              (d,)        i*
    n.super_input               (d,)        i_super
    n.target_output_v.<layer>   (p,)        o*_V of that cross-attention layer
    n.target_output_k.<layer>   (p,)        o*_K, only where keys were trained; otherwise locked: o*_K = W_K i_super

A file of a single concept is a merge of one. Symbols as in `ldm.modules.rank_one`.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.modules.context import Edit, TextLayer, outputs_of
from ldm.modules.rank_one import PROJECTIONS

FORMAT_VERSION = 3
METADATA_KEY = "perfusion"
VECTORS = ("embedding", "target_input", "super_input")
TABLES = ("target_output_v", "target_output_k")
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # smaller ones cannot be calculated with
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
ENERGY = "target_energy"  # a setting that may be missing; older versions, which know nothing of it, read the rest
# what an earlier format than the one named does not have, and what it meant instead
ADDED = ((2, "projection", "full"), (3, "used_layers", []))


class NamedConcept:
    """What was learned of one thing, whatever the method: it has a word, and perhaps a file."""

    placeholder: str
    source: str

    @property
    def label(self) -> str:
        """Its placeholder, and the file it is from where there is one."""
        return f"{self.placeholder} ({self.source})" if self.source else self.placeholder

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name in a file, without the leading position."""
        raise NotImplementedError


@dataclass(eq=False)
class Concept(NamedConcept):
    """What training learned about one thing.

    Attributes:
        placeholder: the word that stands for it in prompts, without white space.
        super_category: what kind of thing it is; may be several words.
        embedding: v, (1, width of the text encoder's word embeddings).
        target_input: i*, (d,).
        super_input: i_super, (d,).
        target_output_v: layer name -> o*_V, (p,).
        target_output_k: layer name -> o*_K, (p,); empty where keys are locked.
        bias: beta.
        temperature: tau, above 0.
        projection: of `ldm.modules.rank_one.PROJECTIONS`.
        used_layers: the layers whose target outputs for values drawing uses; the others give the super-category's
            own, W_V i_super. None named: all are used.
        steps: how many training steps it had.
        base: `base_fingerprint` of the model it was trained on.
        target_energy: ||i*||^2 by the C^-1 it was trained with, which tells whether another is the same; None: not
            known, as of files that older versions wrote.
        source: the file it was loaded from, for messages; not stored.
    """

    placeholder: str
    super_category: str
    embedding: Tensor
    target_input: Tensor
    super_input: Tensor
    target_output_v: dict[str, Tensor]
    target_output_k: dict[str, Tensor] = field(default_factory=dict)
    bias: float = 0.75
    temperature: float = 0.1
    projection: str = "full"
    used_layers: list[str] = field(default_factory=list)
    steps: int = 0
    base: str = ""
    target_energy: float | None = None
    source: str = ""

    @property
    def summary(self) -> str:
        """How it was learned and is used, in a few words."""
        gated = ", gated projection" if self.projection == "gated" else ""
        used = f", {len(self.used_layers)} of {len(self.target_output_v)} layers" if self.used_layers else ""
        return f"bias {self.bias:g}, temperature {self.temperature:g}{gated}{used}"

    @property
    def parameter_count(self) -> int:
        """How many numbers training learned: v and the target outputs."""
        tables = (*self.target_output_v.values(), *self.target_output_k.values())
        return self.embedding.numel() + sum(output.numel() for output in tables)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in VECTORS:
            yield name, getattr(self, name)
        for name in TABLES:
            yield from ((f"{name}.{layer}", output) for layer, output in getattr(self, name).items())


def save_perfusion_concepts(
    path: str | Path, concepts: Sequence[Concept], precision: torch.dtype | None = torch.float16
) -> Path:
    """Writes one concept or several to one file, whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        concepts: at least one.
        precision: float16 keeps files small and costs nothing visible; None: float16 where that changes no number,
            else float32, so that concepts which come from files stay as they are bit for bit.

    Raises:
        UserError: a concept that could not be loaded again, such as one whose training diverged.
    """
    tensors = tensors_to_store(concepts, precision)
    settings = [{name: value for name in (*SETTINGS, ENERGY) if (value := getattr(concept, name)) is not None}
                for concept in concepts]
    _assemble(Path(path), settings, tensors)  # refuses what could not be read back
    metadata = {METADATA_KEY: {"format_version": FORMAT_VERSION, "concepts": settings}}
    return save_tensors(path, tensors, metadata)


def tensors_to_store(concepts: Sequence[NamedConcept], precision: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of concepts under their names in a file; `precision` as for `save_perfusion_concepts`."""
    whole = {f"{n}.{name}": tensor.detach().cpu() for n, c in enumerate(concepts) for name, tensor in c.tensors()}
    precision = lossless_precision(whole.values()) if precision is None else precision
    return {name: tensor.to(precision) for name, tensor in whole.items()}


def lossless_precision(tensors: Iterable[Tensor]) -> torch.dtype:
    """float16 where that changes no number, else float32."""
    exact = all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in tensors)
    return torch.float16 if exact else torch.float32


def load_perfusion_concepts(path: str | Path) -> list[Concept]:
    """The concepts of a file, in its order, as float32 on the CPU.

    Raises:
        UserError: the file is missing, cut off, no concept file, from a later version of this project, or its
            contents are incomplete, do not fit together or are not finite.
    """
    tensors, metadata = load_tensors(path)
    header = metadata.get(METADATA_KEY)
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise UserError(f"{path}: a safetensors file, but not a concept; give a file that training a concept has made")
    if header["format_version"] > FORMAT_VERSION:
        version = header["format_version"]
        raise UserError(f"{path}: concept format {version}, this version reads up to {FORMAT_VERSION}; update it")
    settings = header.get("concepts")
    if not isinstance(settings, list):
        raise UserError(f"{path}: damaged, it lists no concepts; copy or train it again")
    missing = {name: value for version, name, value in ADDED if version > header["format_version"]}
    settings = [{**one, **missing} if isinstance(one, dict) else one for one in settings]
    return _assemble(Path(path), settings, tensors)


def _assemble(path: Path, settings: Sequence[object], tensors: Mapping[str, Tensor]) -> list[Concept]:
    """Concepts from the contents of a file, checked."""
    problem = _problem(settings, tensors)
    if problem:
        raise UserError(f"{path}: {problem}")
    concepts, of_each = [], split_by_index(tensors)
    for n, values in enumerate(settings):
        own = of_each[str(n)]
        vectors = {name: own[name].float() for name in VECTORS}
        tables = {name: {k: t.float() for k, t in _under(f"{name}.", own).items()} for name in TABLES}
        known = {name: values[name] for name in SETTINGS}
        concepts.append(Concept(**known, **vectors, **tables, target_energy=values.get(ENERGY), source=str(path)))
    return concepts


def split_by_index(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each concept by its position, their names without it: files of thousands are sorted once."""
    of_each: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        position, _, rest = name.partition(".")
        of_each.setdefault(position, {})[rest] = tensor
    return of_each


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _problem(settings: Sequence[object], tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the contents of a concept file and what to do about it, or None."""
    if not settings:
        return "no concept in it; train one or name another file"
    of_each = split_by_index(tensors)
    positions = [str(n) for n in range(len(settings))]
    for n, values in zip(positions, settings, strict=True):
        own = of_each.get(n, {})
        problem = _settings_problem(values) or _tensors_problem(own) or _layers_problem(values["used_layers"], own)
        if problem:
            name = values.get("placeholder", n) if isinstance(values, dict) else n
            return f"concept {name}: {problem}"
    known = set(positions)
    unknown = [name for name in tensors if not _is_known(name, known)]
    if unknown:
        return f"holds {unknown[0]}, which belongs to no concept in it; copy or train it again"
    repeated = first_duplicate([values["placeholder"] for values in settings])
    if repeated is not None:
        return f"several concepts are called {repeated}, where case does not count; give each its own placeholder"
    shapes = [_base_shapes(of_each[n]) for n in positions]
    if any(one != shapes[0] for one in shapes) or len({values["base"] for values in settings}) > 1:
        return "its concepts are of different base models; keep them in files of their own"
    return None


def _base_shapes(own: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes that follow from the base model; keys left out, as some concepts have trained ones, others locked."""
    return {name: tensor.shape for name, tensor in own.items() if not name.startswith("target_output_k.")}


def _settings_problem(values: object) -> str | None:
    if not isinstance(values, dict):
        return "its settings are damaged; copy or train it again"
    for name, kind in SETTINGS.items():
        if not isinstance(values.get(name), kind) or isinstance(values[name], bool):
            return f"its {name} is missing or of the wrong kind; copy or train it again"
    if not is_placeholder(values["placeholder"]):
        return "its placeholder must be a word without white space; give it another"
    if not _is_finite(values["bias"]):
        return f"its bias is {values['bias']}; give it a number, such as 0.75"
    if not (_is_finite(values["temperature"]) and values["temperature"] > 0):
        return f"its temperature is {values['temperature']}; give it a number above 0, such as 0.1"
    if values["projection"] not in PROJECTIONS:
        return f"its projection {values['projection']!r} is none of {', '.join(PROJECTIONS)}; train it again"
    if ENERGY in values and not _is_energy(values[ENERGY]):
        return f"its {ENERGY} {values[ENERGY]!r} is no number above 0; train it again"
    return None


def _is_energy(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value) and value > 0


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _tensors_problem(own: Mapping[str, Tensor]) -> str | None:
    missing = [name for name in VECTORS if name not in own]
    values, keys = (_under(f"{name}.", own) for name in TABLES)
    if missing or not values:
        return f"{', '.join(missing) or 'target_output_v'} is missing; copy or train it again"
    embedding, target_input, super_input = (own[name] for name in VECTORS)
    if embedding.ndim != 2 or len(embedding) != 1:
        return f"its embedding must be one vector, not of shape {tuple(embedding.shape)}; train it again"
    if target_input.ndim != 1 or super_input.shape != target_input.shape:
        shapes = tuple(target_input.shape), tuple(super_input.shape)
        return f"its target_input and super_input must be vectors of one size, not {shapes[0]} and {shapes[1]}"
    if keys and set(keys) != set(values):
        return f"trained keys but no values, or the reverse, in layer {min(set(keys) ^ set(values))}; train it again"
    for layer, output in values.items():
        if output.ndim != 1 or keys.get(layer, output).shape != output.shape:
            return f"its target outputs of layer {layer} do not fit together; copy or train it again"
    problem = find_invalid_numbers(own)
    if problem is None and not target_input.any():
        return "its target_input is zero, which is no direction; copy or train it again"
    return problem


def _layers_problem(used: Sequence[object], own: Mapping[str, Tensor]) -> str | None:
    unknown = [layer for layer in used if f"target_output_v.{layer}" not in own]
    return f"it uses layer {unknown[0]}, of which it has no target output; train it again" if unknown else None


def find_invalid_numbers(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the numbers of a concept file, or None."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            return f"{name} holds {tensor.dtype} instead of floating-point numbers; copy or train it again"
        if not tensor.isfinite().all():
            return f"{name} holds numbers that are not finite: training diverged; train with lower learning rates"
    return None


def _is_known(name: str, positions: Container[str]) -> bool:
    position, _, rest = name.partition(".")
    return position in positions and (
        rest in VECTORS or rest.startswith(tuple(f"{name}." for name in TABLES))
    )


def is_placeholder(word: str) -> bool:
    """Whether `word` can stand for a concept in a prompt: not empty and without white space."""
    return word.split() == [word]


def first_duplicate(words: Sequence[str]) -> str | None:
    """The first word that stands there a second time, in any case, as prompts read them; None: there is none."""
    seen: set[str] = set()
    for word in words:
        if word.lower() in seen:
            return word
        seen.add(word.lower())
    return None


def base_fingerprint(text_layers: Mapping[str, TextLayer]) -> str:
    """sha256 of W_K and W_V of every layer that reads text, which is what a concept is tied to.

    Weights are hashed as float16, so a model gives the same fingerprint on any device, and whether it was loaded
    from its 16-bit or its 32-bit file.
    """
    digest = hashlib.sha256()
    for name in sorted(text_layers):
        for part in ("to_k", "to_v"):
            weight = getattr(text_layers[name], part).weight.detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{name}.{part} {tuple(weight.shape)}".encode())
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def check_base(concept: Concept, fingerprint: str) -> None:
    """Raises a UserError where the concept was trained on another base model than that with this fingerprint."""
    if concept.base != fingerprint:
        raise UserError(
            f"concept {concept.label} was trained on base model {short(concept.base)}, but the loaded one is "
            f"{short(fingerprint)}; load the model it was trained on, or train it again on this one"
        )


def short(fingerprint: str) -> str:
    """A fingerprint as messages have it."""
    return fingerprint[:12] or "(unknown)"


def stack_concepts(concepts: Sequence[Concept], text_layers: Mapping[str, TextLayer]) -> Edit:
    """The edit that these concepts make together, on the device of the layers, in float32.

    To use one with another bias or temperature, give `dataclasses.replace(concept, bias=..., temperature=...)`.

    Args:
        concepts: at least one, of the base model that the layers are part of (see `check_base`).
        text_layers: layer name -> layer, as `ldm.modules.attention.name_text_layers` gives them.

    Raises:
        UserError: a concept has no value for one of the layers, or values for others.
    """
    for concept in concepts:
        odd = sorted(set(concept.target_output_v) ^ set(text_layers))
        odd += [name for name, layer in text_layers.items() if not odd and layer.to_v.weight.shape != torch.Size(
            [len(concept.target_output_v[name]), len(concept.super_input)])]
        if odd:
            raise UserError(f"concept {concept.label} does not fit this model: they differ in layer {odd[0]}; "
                            "train it again")
    super_inputs = torch.stack([concept.super_input for concept in concepts])
    used = [{name: output for name, output in concept.target_output_v.items()
             if not concept.used_layers or name in concept.used_layers} for concept in concepts]
    values = _own_or(used, outputs_of(text_layers, super_inputs, "to_v"))
    keys = _own_or([concept.target_output_k for concept in concepts], outputs_of(text_layers, super_inputs, "to_k"))
    device = next(iter(keys.values())).device
    return Edit(
        target_inputs=torch.stack([concept.target_input for concept in concepts]).float().to(device),
        **gate_settings(concepts, device),
        target_outputs_v=values,
        target_outputs_k=keys,
        projections=[concept.projection for concept in concepts],
    )


def _own_or(own: Sequence[Mapping[str, Tensor]], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each layer what each concept has there, or else its super-category: (J, p); brought to the device at once."""
    outputs = {}
    for name, rows in plain.items():
        there = [place for place, one in enumerate(own) if name in one]
        outputs[name] = rows.clone()
        if there:
            outputs[name][there] = torch.stack([own[place][name] for place in there]).to(rows)
    return outputs


def gate_settings(concepts: Sequence[Concept], device: torch.device) -> dict[str, Tensor]:
    """`biases` and `temperatures`, (J,) each, as an `Edit` has them."""
    return {"biases": torch.tensor([float(concept.bias) for concept in concepts], device=device),
            "temperatures": torch.tensor([float(concept.temperature) for concept in concepts], device=device)}
