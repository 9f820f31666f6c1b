"""The parts of a latent diffusion model in a file, U-Net, first stage and text encoders; each may be missing."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.absent_parts import CLIP_G, CLIP_L, CONDITIONER, FIRST_STAGE, PART_NAMES, TEXT_ENCODER, UNET
from ldm.checkpoints.read import read_state_dict
from ldm.checkpoints.text_towers import TOWER_PREFIXES, read_text_encoders
from ldm.common.errors import UserError

Paths = str | Path | Sequence[str | Path]
PART_PREFIXES = ("model.", UNET, FIRST_STAGE, TEXT_ENCODER, CONDITIONER, CLIP_L, CLIP_G)
FIRST_STAGE_PREFIXES = ("first_stage_model.", "vae.", "")  # how a file of a first stage alone may begin its names


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


def replace_parts(tensors: dict[str, Tensor], required: Mapping[str, Tensor], parts: Mapping[str, Paths]
                  ) -> dict[str, Tensor]:
    """Return a whole model's tensors with some parts from other files.

    Args:
        tensors: the model's tensors.
        required: the module's tensors.
        parts: `FIRST_STAGE` -> file or folder of that part, or of a whole model; `TEXT_ENCODER` -> one or more of
            text encoders. Of two encoders, a file may replace one.

    Raises:
        UserError: a file does not hold the part.
    """
    for part, path in parts.items():
        found = read_text_encoders(path, required) if part == TEXT_ENCODER else _read_first_stage(path)
        replaced = tuple(prefix for prefix in (FIRST_STAGE, *TOWER_PREFIXES)
                         if any(key.startswith(prefix) for key in found))
        tensors = {key: value for key, value in tensors.items() if not key.startswith(replaced)} | found
    return tensors


def _read_first_stage(path: str | Path) -> dict[str, Tensor]:
    stored = read_state_dict(path)
    for own in FIRST_STAGE_PREFIXES:
        part = {key.removeprefix(own): value for key, value in stored.items() if key.startswith(own)}
        if any(key.startswith("decoder.") for key in part):
            return {FIRST_STAGE + key: value for key, value in part.items()}
    raise UserError(f"--vae {path}: holds no {PART_NAMES[FIRST_STAGE]}; choose another file")
