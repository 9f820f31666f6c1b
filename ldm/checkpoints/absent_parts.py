"""Say which parts of a latent diffusion model a checkpoint lacks, and where to take them from. Imports no torch."""
from __future__ import annotations

from collections.abc import Collection, Iterable

UNET, FIRST_STAGE, TEXT_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CONDITIONER = "conditioner."  # the text encoders of Stable Diffusion XL
CLIP_L, CLIP_G = f"{CONDITIONER}embedders.0.", f"{CONDITIONER}embedders.1."
PART_NAMES = {UNET: "U-Net", FIRST_STAGE: "first stage (VAE)", TEXT_ENCODER: "text encoder",
              CLIP_L: "first text encoder (CLIP ViT-L)", CLIP_G: "second text encoder (OpenCLIP ViT-bigG)"}
REMEDIES = {FIRST_STAGE: "--vae FILE", TEXT_ENCODER: "--text_encoder FOLDER",
            CLIP_L: "--text_encoder clip_l.safetensors", CLIP_G: "--text_encoder clip_g.safetensors"}
BOTH_ENCODERS = "--text_encoder clip_l.safetensors,clip_g.safetensors"


def describe_absent_parts(missing: Iterable[str], required: Iterable[str], stored: Collection[str]) -> str:
    """Say which whole parts of a model a file lacks, and the remedy; "" if the missing keys are not just whole parts.

    Args:
        missing: the required keys that the file lacks.
        required: all keys of the module.
        stored: the file's keys, under the module's names.
    """
    needed = [prefix for prefix in PART_NAMES if any(key.startswith(prefix) for key in required)]
    absent = [prefix for prefix in needed if not any(key.startswith(prefix) for key in stored)]
    if UNET in absent or not absent or not all(key.startswith(tuple(absent)) for key in missing):
        return ""
    return absence_message(absent, alone=len(absent) == len(needed) - 1)


def absence_message(absent: Iterable[str], alone: bool) -> str:
    """Say that a file lacks these parts, and the remedy.

    Args:
        absent: prefixes of the parts, without the U-Net.
        alone: whether the file holds the U-Net only.
    """
    absent = list(absent)
    *first, last = [f"no {PART_NAMES[prefix]}" for prefix in absent]
    parts = f"{', '.join(first)} and {last}" if first else last
    flags = " and ".join(_remedies(absent))
    what = "holds the U-Net alone, " if alone else "holds "
    return f"{what}{parts}; take what is missing from another file with {flags}, or give a whole model's checkpoint"


def _remedies(absent: list[str]) -> list[str]:
    """Return the flags that name other files for parts, with both text encoders in one."""
    if CLIP_L not in absent or CLIP_G not in absent:
        return [REMEDIES[prefix] for prefix in absent]
    return [REMEDIES[prefix] for prefix in absent if not prefix.startswith(CONDITIONER)] + [BOTH_ENCODERS]
