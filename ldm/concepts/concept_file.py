"""The file format of Perfusion's concepts: load and save. `docs/concept_file.md` describes it for other programs.

File format 4 (safetensors). Metadata key `perfusion`, JSON:

    {"format_version": 4, "concepts": [{"placeholder", "super_category", "word_parts", "bias", "temperature",
                                        "projection", "used_layers", "pooled", "steps", "base", and optionally
                                        "target_energy", "base_name", "base_samples", "date", "resolution",
                                        "prediction_type"}, ...]}

Metadata keys `modelspec.*` describe the file for people and other programs (`ldm.concepts.model_spec`). Tensors of the
concept at index n of that list:

    n.<word part>               (1, width)  learned word embedding v of the placeholder, one tensor for each name in
                                            "word_parts": clip_l, clip_g, clip_h or bert
    n.target_input              (d,)        i*
    n.super_input               (d,)        i_super
    n.dual                      (d,)        C^-1 i*, float32; missing in files made of older ones
    n.target_output_v.<layer>   (p,)        o*_V of that cross-attention layer; other layers use W_V i_super
    n.target_output_k.<layer>   (p,)        o*_K, only if keys were trained; otherwise locked: o*_K = W_K i_super

In a file of one concept the word parts have no index: `clip_l` instead of `0.clip_l`. Such a file is also a valid
embedding for programs that look for these names, such as ComfyUI. They read the word alone, without the edit.

Words beside the concepts, such as embeddings of Textual Inversion, are stored as `ldm.concepts.finetuned_concept_file`
says, with `word.` before the names of tensors.

`n.dual` is the dual of the i* of training, before it is rounded to 16 bits for the file: gates are those of training.
"target_energy" is the product of both as stored: ||i*||^2 up to rounding, which shows that they belong together. In a
file without the dual it is ||i*||^2 of training, to detect another C.

Earlier formats still load, and are saved in this one. Format 3 has the word as `n.embedding`, and neither `dual` nor
`pooled`; all layers have target outputs. Format 2 has no `used_layers` either: all layers are used. Format 1 has no
`projection`: all projections are full. A file with a single concept is a merge of one. Symbols as in
`ldm.modules.rank_one`.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.concepts import thumbnail as thumbnails
from ldm.concepts.concept import SUPER_CATEGORY, Concept, usual_word_parts
from ldm.concepts.concept_checks import ENERGY, LAYER_OUTPUTS, OPTIONAL_TEXTS, SETTINGS, dual_energy, find_problem
from ldm.concepts.file_tensors import DUAL, WORD, split_by_index, tensors_to_store, tensors_under
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.finetuned_concept_file import finetuned_contents
from ldm.concepts.model_spec import model_spec

FORMAT_VERSION = 4
METADATA_KEY = "perfusion"
OLD_WORD = "embedding"  # name of the word's tensor before format 4
ADDED_SETTINGS = (  # format that added it, name, earlier meaning
    (2, "projection", "full"),
    (3, "used_layers", []),
    (4, "pooled", SUPER_CATEGORY),
)


def save_perfusion_concepts(
    path: str | Path, concepts: Sequence[Concept], precision: torch.dtype | None = torch.float16, thumbnail: str = "",
    words: Sequence[FinetunedConcept] = (),
) -> Path:
    """Write concepts to one file. The file is complete or not written at all.

    Args:
        path: the file; an existing one is replaced.
        concepts: at least one, all trained on the same base model.
        precision: dtype of the tensors, except duals. float16 keeps files small without a visible loss. None: float16
            if that changes no number, else float32, so that concepts loaded from files are saved bit for bit.
        thumbnail: a small image of the file, see `ldm.concepts.thumbnail`; "": that of a single concept, or none.
        words: words to store beside them.

    Raises:
        UserError: the file could not be loaded again, for example because training diverged.
    """
    tensors = tensors_to_store(concepts, precision)
    by_index = split_by_index(tensors)
    settings = [_settings_of(concept, by_index[str(index)]) for index, concept in enumerate(concepts)]
    _check_contents(path, settings, tensors)
    if len(concepts) == 1:  # a valid embedding for other programs
        tensors = {_without_index(name, concepts[0].word_parts): tensor for name, tensor in tensors.items()}
    header = {METADATA_KEY: {"format_version": FORMAT_VERSION, "concepts": settings}}
    if words:
        word_tensors, word_header = finetuned_contents(path, words, precision)
        tensors |= {WORD + name: tensor for name, tensor in word_tensors.items()}
        header |= word_header
    return save_tensors(path, tensors, header | model_spec(concepts, tensors, thumbnail))


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

    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(WORD)}
    settings, tensors = _upgrade(version, settings, tensors)
    _check_contents(path, settings, tensors)
    by_index = split_by_index(tensors)
    concepts = [_build_concept(path, values, by_index[str(index)]) for index, values in enumerate(settings)]
    if len(concepts) == 1:
        concepts[0].thumbnail = thumbnails.check_thumbnail(path, metadata.get(thumbnails.METADATA_KEY, ""))
    return concepts


def _settings_of(concept: Concept, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the settings of a concept in a file; `tensors` are those that will be stored of it."""
    settings = {name: getattr(concept, name) for name in SETTINGS} | {"word_parts": list(concept.word_parts)}
    energy = concept.target_energy
    if energy is not None and concept.dual is not None:
        energy = dual_energy(tensors)
    if energy is not None and math.isfinite(energy):  # otherwise the check of the tensors says what is wrong
        settings[ENERGY] = energy
    return settings | {name: getattr(concept, name) for name in OPTIONAL_TEXTS if getattr(concept, name)}


def _without_index(name: str, word_parts: Mapping[str, int]) -> str:
    bare = name.removeprefix("0.")
    return bare if bare in word_parts else name


def _upgrade(version: int, settings: Sequence[object], tensors: Mapping[str, Tensor]
             ) -> tuple[list[object], dict[str, Tensor]]:
    """Return the settings and tensors of a file as format 4 has them, with an index before every tensor's name.

    Contents that are damaged pass, for `find_problem` to name what is wrong.
    """
    upgraded, renamed = [], {}
    for index, values in enumerate(settings):
        if isinstance(values, dict):
            values = values | {name: value for since, name, value in ADDED_SETTINGS if since > version}
            if version < 4:
                word = tensors.get(f"{index}.{OLD_WORD}")
                parts = list(usual_word_parts(word.shape[-1] if word is not None and word.ndim else 0))
                values["word_parts"] = parts
                renamed[f"{index}.{OLD_WORD}"] = f"{index}.{parts[0]}"
            elif len(settings) == 1 and isinstance(values.get("word_parts"), list):
                renamed |= {part: f"0.{part}" for part in values["word_parts"] if isinstance(part, str)}
        upgraded.append(values)
    return upgraded, {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def _build_concept(path: str | Path, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Concept:
    """Return a concept from its settings and tensors, which are checked already."""
    outputs = {}
    for stored_name, attribute in LAYER_OUTPUTS.items():
        by_layer = tensors_under(f"{stored_name}.", tensors)
        outputs[attribute] = {layer: output.float() for layer, output in by_layer.items()}
    words = {part: tensors[part].float() for part in settings["word_parts"]}
    return Concept(
        **{name: settings[name] for name in SETTINGS if name != "word_parts"},
        word_parts={part: word.shape[1] for part, word in words.items()},
        embedding=torch.cat(list(words.values()), 1),
        target_input=tensors["target_input"].float(),
        super_input=tensors["super_input"].float(),
        dual=tensors[DUAL].float() if DUAL in tensors else None,
        **outputs,
        target_energy=settings.get(ENERGY),
        **{name: settings.get(name, "") for name in OPTIONAL_TEXTS},
        source=str(path),
    )


def _check_contents(path: str | Path, settings: Sequence[object], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if the contents of a concept file are not valid."""
    problem = find_problem(settings, tensors)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
