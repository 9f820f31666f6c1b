"""Bring text encoders of any file under a model's own names.

A CLIP text tower has two spellings, that of `transformers` and that of open_clip. A model has one tower (Stable
Diffusion 1 and 2) or two (Stable Diffusion XL); files hold one or both, whole models or towers alone.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.absent_parts import CLIP_G, CLIP_L, TEXT_ENCODER
from ldm.checkpoints.diffusers_names import projected_clip_tensors
from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError
from ldm.common.paths import listed_paths

Tensors = Mapping[str, Tensor]
# The prefix of a CLIP text tower's keys in CompVis's files, in later ones, and in those of Stable Diffusion 2
TOWER, SHORT_TOWER, OPEN_CLIP = "transformer.text_model.", "transformer.", "model."
TOWER_PREFIXES = (TEXT_ENCODER, CLIP_L, CLIP_G)  # of the towers of a whole model
OWN_PREFIXES = ("text_encoder.", "clip_l.", "clip_g.", "")  # how a file that holds towers alone may begin its names
BARE_TOWERS = ("text_model.", "embeddings.token_embedding.", "embeddings.position_embedding.", "encoder.layers.",
               "final_layer_norm.")  # as `transformers` writes a CLIP text tower
BARE_OPEN_CLIP = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
PROJECTION = "text_projection.weight"  # of `transformers`; open_clip has its transpose, without `.weight`
TABLES = ("embeddings.token_embedding.weight", f"{OPEN_CLIP}token_embedding.weight")
UNREAD_SUFFIXES = ("position_ids", "attn_mask",  # buffers that `transformers` and `open_clip` once saved
                   f"transformer.text_model.{PROJECTION}", f"transformer.{PROJECTION}")
UNREAD_PREFIXES = (f"{CLIP_L}logit_scale", f"{CLIP_L}text_projection", f"{CLIP_G}logit_scale",
                   f"{CLIP_G}model.logit_scale")


def rename_text_encoders(tensors: Tensors, required: Tensors) -> dict[str, Tensor]:
    """Return a file's tensors with the text encoders' keys in the module's spelling.

    Args:
        tensors: the file's tensors, under the prefixes of a whole model or of one part.
        required: the module's tensors.
    """
    renamed = _move_only_tower(tensors, required)
    for prefix in ("", *TOWER_PREFIXES):
        renamed = _lengthen_names(renamed, required, prefix)
    for prefix in TOWER_PREFIXES:
        if any(key.startswith(f"{prefix}{OPEN_CLIP}transformer.") for key in required):
            renamed = _as_open_clip(renamed, prefix)
    return renamed


def read_text_encoders(paths: str | Path | Sequence[str | Path], required: Tensors) -> dict[str, Tensor]:
    """Return the text encoders of one or more files or folders under a model's keys.

    Args:
        paths: each holds one tower or both, or a whole model that has them; see `listed_paths`.
        required: the model's tensors.

    Raises:
        UserError: a file holds no text encoder, or one of another width than the model's.
    """
    places = [prefix for prefix in TOWER_PREFIXES if any(key.startswith(prefix) for key in required)]
    placed: dict[str, Tensor] = {}
    for path in listed_paths(paths):
        towers = _towers_in(read_state_dict(path))
        if not towers:
            raise UserError(f"--text_encoder {path}: holds no text encoder; choose another file")
        for tower in towers:
            prefix = places[0] if len(places) == 1 else _find_place(tower, places, required, placed, path)
            placed |= {prefix + key: value for key, value in tower.items()}
    return placed


def _move_only_tower(tensors: Tensors, required: Tensors) -> dict[str, Tensor]:
    """Return the tensors of Stable Diffusion 1 or 2 with its text encoder under CompVis's prefix instead of sgm's."""
    starts = {prefix for prefix in TOWER_PREFIXES if any(key.startswith(prefix) for key in tensors)}
    if starts != {CLIP_L} or not any(key.startswith(TEXT_ENCODER) for key in required):
        return dict(tensors)
    return {TEXT_ENCODER + key.removeprefix(CLIP_L) if key.startswith(CLIP_L) else key: value
            for key, value in tensors.items()}


def _lengthen_names(tensors: dict[str, Tensor], required: Tensors, prefix: str) -> dict[str, Tensor]:
    """Put `text_model.` into the keys of a tower, which later files leave out, where the module has it."""
    start, longer_start = prefix + SHORT_TOWER, prefix + TOWER
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        longer = longer_start + key.removeprefix(start) if key.startswith(start) else key
        renamed[longer if key not in required and longer in required else key] = value
    return renamed


def _as_open_clip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors with the tower at this prefix in open_clip's spelling."""
    start = prefix + SHORT_TOWER
    tower = {key.removeprefix(start).removeprefix("text_model."): value for key, value in tensors.items()
             if key.startswith(start) and not key.endswith("position_ids")}
    result = {key: value for key, value in tensors.items() if not key.startswith(start)}
    # Files of diffusers' own conversion script have open_clip's names, but the projection of `transformers`.
    projection = result.pop(f"{prefix}{OPEN_CLIP}{PROJECTION}", None)
    if projection is not None:
        tower[PROJECTION] = projection
    return result | {prefix + key: value for key, value in projected_clip_tensors(tower).items()}


def _towers_in(tensors: Tensors) -> list[dict[str, Tensor]]:
    """Return the text towers of a file, each with keys that begin with `transformer.` or `model.`."""
    found = []
    for prefixes in (TOWER_PREFIXES, *((own,) for own in OWN_PREFIXES)):
        for prefix in prefixes:
            part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            tower = _compvis_names(part)
            if any(key.startswith((SHORT_TOWER, OPEN_CLIP)) for key in tower):
                found.append(tower)
        if found:
            return found
    return []


def _compvis_names(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a text encoder with those of a CLIP text tower under the names in CompVis's files."""
    if any(key.startswith(BARE_TOWERS) for key in tensors):
        return {TOWER + key.removeprefix("text_model."): value for key, value in tensors.items()
                if key.startswith(BARE_TOWERS) or key == PROJECTION}
    if any(key.startswith(BARE_OPEN_CLIP) for key in tensors):
        return {f"{OPEN_CLIP}{key}": value for key, value in tensors.items() if key.startswith(BARE_OPEN_CLIP)}
    return dict(tensors)


def _find_place(tower: Tensors, places: Sequence[str], required: Tensors, placed: Tensors, path: str | Path) -> str:
    """Return the prefix of the model's tower that has the width of this one; of several, the first that is free.

    Raises:
        UserError: the model has no tower of that width.
    """
    width = _table_width(tower)
    widths = {prefix: _table_width({key: value for key, value in required.items() if key.startswith(prefix)})
              for prefix in places}
    fitting = [prefix for prefix in places if widths[prefix] == width]
    if not fitting:
        known = " and ".join(str(number) for number in widths.values())
        raise UserError(f"--text_encoder {path}: holds a text encoder of width {width}, and this model's have {known}; "
                        "give CLIP ViT-L and OpenCLIP ViT-bigG for Stable Diffusion XL")
    # Towers of the same width differ in the pooled output: the second one has a projection.
    if len(fitting) > 1 and any("text_projection" in key for key in tower):
        return fitting[-1]
    return next((prefix for prefix in fitting if not any(key.startswith(prefix) for key in placed)), fitting[0])


def _table_width(tensors: Tensors) -> int | None:
    """Return the width of the table of word pieces among a tower's tensors."""
    return next((value.shape[1] for key, value in tensors.items() if key.endswith(TABLES) and value.ndim == 2), None)
