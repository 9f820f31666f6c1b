"""The parts of a latent diffusion model in a file, U-Net, first stage and text encoder; each may be missing."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.absent_parts import FIRST_STAGE, PART_NAMES, REMEDIES, TEXT_ENCODER, UNET
from ldm.checkpoints.diffusers_names import open_clip_tensors
from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError

PART_PREFIXES = ("model.", UNET, FIRST_STAGE, TEXT_ENCODER)
UNREAD_SUFFIXES = ("position_ids", "attn_mask")  # buffers that `transformers` and `open_clip` once saved
# The prefix of a CLIP text tower's keys in CompVis's files, in later ones, and in those of Stable Diffusion 2
TOWER, SHORT_TOWER = "transformer.text_model.", "transformer."
CLIP = TEXT_ENCODER + TOWER
OPEN_CLIP = f"{TEXT_ENCODER}model."
# How a file that holds a part alone may begin its names
OWN_PREFIXES = {FIRST_STAGE: ("first_stage_model.", "vae.", ""),
                TEXT_ENCODER: ("cond_stage_model.", "text_encoder.", "")}
BARE_TOWERS = ("text_model.", "embeddings.token_embedding.", "embeddings.position_embedding.", "encoder.layers.",
               "final_layer_norm.")  # as `transformers` writes a CLIP text tower
BARE_OPEN_CLIP = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def select_part(tensors: dict[str, Tensor], required: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the module's own keys if one is a whole model's, and the other a part of it."""
    for prefix in ("", *PART_PREFIXES):
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if part.keys() & required.keys():
            return part
    for prefix in PART_PREFIXES:
        whole = {prefix + key: value for key, value in tensors.items()}
        if whole.keys() & required.keys():
            return whole
    return tensors


def replace_parts(tensors: dict[str, Tensor], parts: Mapping[str, str | Path]) -> dict[str, Tensor]:
    """Return a whole model's tensors with some parts from other files.

    Args:
        parts: `FIRST_STAGE` or `TEXT_ENCODER` -> file or folder of that part, or of a whole model.

    Raises:
        UserError: a file does not hold the part.
    """
    for prefix, path in parts.items():
        kept = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
        tensors = kept | _read_part(prefix, path)
    return tensors


def _read_part(prefix: str, path: str | Path) -> dict[str, Tensor]:
    stored = read_state_dict(path)
    for own in OWN_PREFIXES[prefix]:
        part = {key.removeprefix(own): value for key, value in stored.items() if key.startswith(own)}
        if prefix == TEXT_ENCODER:
            part = _compvis_names(part)
        if _is_part(prefix, part):
            return {prefix + key: value for key, value in part.items()}
    raise UserError(f"{REMEDIES[prefix].split()[0]} {path}: holds no {PART_NAMES[prefix]}; choose another file")


def _compvis_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a text encoder with those of a CLIP text tower under the names in CompVis's files."""
    if any(key.startswith(BARE_TOWERS) for key in tensors):
        towers = {key: value for key, value in tensors.items() if key.startswith(BARE_TOWERS)}
        return {TOWER + key.removeprefix("text_model."): value for key, value in towers.items()}
    if any(key.startswith(BARE_OPEN_CLIP) for key in tensors):
        return {f"model.{key}": value for key, value in tensors.items() if key.startswith(BARE_OPEN_CLIP)}
    return dict(tensors)


def _is_part(prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    if prefix == FIRST_STAGE:
        return any(key.startswith("decoder.") for key in tensors)
    return any(key.startswith(("transformer.", "model.")) for key in tensors)


def rename_text_encoder(tensors: dict[str, Tensor], required: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the text encoder's keys in the module's spelling. Files use three spellings."""
    # Later files leave out `text_model.`
    longer_names: dict[str, str] = {}
    for prefix in ("", TEXT_ENCODER):
        for key in tensors:
            if key.startswith(prefix + SHORT_TOWER):
                longer_names[key] = prefix + TOWER + key.removeprefix(prefix + SHORT_TOWER)
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        longer = longer_names.get(key, key)
        renamed[longer if key not in required and longer in required else key] = value
    # A module of Stable Diffusion 2 has open_clip's names
    tower = {key.removeprefix(CLIP): value for key, value in renamed.items()
             if key.startswith(CLIP) and not key.endswith(UNREAD_SUFFIXES)}
    if not tower or not any(key.startswith(f"{OPEN_CLIP}transformer.") for key in required):
        return renamed
    others = {key: value for key, value in renamed.items() if not key.startswith(CLIP)}
    return others | {OPEN_CLIP + key: value for key, value in open_clip_tensors(tower).items()}
