"""Check the files of a command before torch is imported and a model is built, by their headers alone.

A damaged file passes: reading it then says what is wrong.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoints.absent_parts import CLIP_G, CLIP_L, FIRST_STAGE, TEXT_ENCODER, UNET, absence_message
from ldm.checkpoints.families import context_width, identify_family
from ldm.checkpoints.header import Header, read_header
from ldm.checkpoints.other_kinds import RUN, Family, Role, describe_unusable, identify_pickled
from ldm.checkpoints.weight_files import weight_files
from ldm.common.errors import UserError
from ldm.common.file_formats import read_beginning
from ldm.common.paths import listed_paths, resolve_path

OWN_METADATA = {"perfusion", "personalization"}  # keys of the formats of `ldm.concepts.storage`
NO_CONCEPT = {  # what to do with a file that is no concept
    Role.BASE: "give it with --ckpt (main.py: --actual_resume), and with --concept a file that training has written",
    Role.PART: "it belongs to a base model; give a file that training has written",
    Role.ADDITION: "this project does not apply such files; give a file that training has written",
    Role.LORA: "give it with --lora, and with --concept a file that training has written",
    Role.RUN: "give the concept file of its log folder, or continue the run with main.py --resume",
    Role.OTHER: "give a file that training has written",
}
PNG, IMAGE_EMBEDDING = b"\x89PNG", "sd-ti-embedding"  # the latter is the name of a text in the image
NO_LORA = {  # what to do with a file that is no LoRA
    Role.BASE: "give it with --ckpt",
    Role.EMBEDDING: "give it with --concept",
    Role.CONCEPT: "give it with --concept",
}
DIFFUSION_PREFIXES = (UNET, "diffusion_model.", "input_blocks.", "model_ema.diffusion_model")
PART_STARTS = {  # how the names of a part may begin in a whole model's file
    FIRST_STAGE: (FIRST_STAGE, "vae."), TEXT_ENCODER: (TEXT_ENCODER, "text_encoder.", CLIP_L),
    CLIP_L: (CLIP_L,), CLIP_G: (CLIP_G,)}
TWO_ENCODERS = "GeneralConditioner"  # class of Stable Diffusion XL's text encoders


def identify_file(path: Path) -> Family | None:
    """Return what kind of model, or of addition to one, a file holds; None if it is unknown or damaged.

    Raises:
        UserError: the file is missing, or is something else altogether, such as a web page.
    """
    header = read_header(path)
    return None if header is None else identify_header(header)


def identify_header(header: Header) -> Family | None:
    """Return what kind of file a header is of, or None if it is unknown."""
    return identify_pickled(header.content) or identify_family(header.shapes)


def check_concept(path: str | Path) -> None:
    """Raise UserError if a file is missing or is known to hold no concept. The message says what it is."""
    path = resolve_path(path)
    if holds_image_embedding(path):
        return
    header = read_header(path)
    if header is None or OWN_METADATA & header.metadata.keys():
        return
    family = identify_header(header)
    is_training_run = isinstance(header.content, Mapping) and "global_step" in header.content
    if family is None and is_training_run:
        family = RUN
    if family is not None and family.role in NO_CONCEPT:
        raise UserError(f"{path}: is {family.name}, not a concept; {NO_CONCEPT[family.role]}")


def holds_image_embedding(path: Path) -> bool:
    """Return whether a file is an image in which AUTOMATIC1111's web UI has stored an embedding."""
    header = read_beginning(path) if path.is_file() else b""
    return header.startswith(PNG) and IMAGE_EMBEDDING.encode() in header


def check_lora(path: str | Path) -> None:
    """Raise UserError if a file or folder is missing or is known to hold no LoRA. The message says what it is."""
    found = resolve_path(path)
    if not found.exists():
        raise UserError(f"--lora {path}: no such file; a scale is written after a colon, as in style.safetensors:0.8")
    header = None if found.is_dir() else read_header(found)
    family = None if header is None else identify_header(header)
    if header is not None and OWN_METADATA & header.metadata.keys():
        raise UserError(f"--lora {path}: is a concept of this project, not a LoRA; {NO_LORA[Role.CONCEPT]}")
    if family is not None and family.role is not Role.LORA:
        remedy = NO_LORA.get(family.role, "give a file that a LoRA trainer has written")
        raise UserError(f"--lora {path}: is {family.name}, not a LoRA; {remedy}")


def holds_own_concept(path: str | Path) -> bool:
    """Return whether a file has one of this project's formats of concepts; also if it is damaged safetensors."""
    path = resolve_path(path)
    header = read_header(path)
    if header is None:
        return path.suffix == ".safetensors"
    return bool(OWN_METADATA & header.metadata.keys())


def check_checkpoint(flag: str, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """Raise UserError if a file cannot be the weights of a config's model. The message says what it is.

    Args:
        flag: what names the file, for messages.
        path: file or diffusers folder.
        config: the model's config as plain values; None: check only that the file can be a base model.
    """
    found = resolve_path(path)
    if not found.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    header = _read_folder_header(found) if found.is_dir() else read_header(found)
    family = None if header is None else identify_header(header)
    if header is None or family is None:
        return
    if family.role not in (Role.BASE, Role.PART):
        raise UserError(f"{flag} {path}: {describe_unusable(family)}")
    params = _model_params(config)
    if "unet_config" not in params:
        return
    if family.role is Role.PART:
        raise UserError(f"{flag} {path}: is {family.name}, not a base model; {family.advice}")
    expected, width = _config_width(params), context_width(header.shapes)
    if expected is not None and width is not None and expected != width:
        raise UserError(f"{flag} {path}: does not fit this config, whose text encodings have {expected} numbers; it "
                        f"looks like {family.name}: {family.advice}")
    if not found.is_dir():
        _check_parts(flag, path, params, header)


def _read_folder_header(folder: Path) -> Header | None:
    """Return what the U-Net's files in a folder of diffusers hold, or None if there are none or one is damaged."""
    headers = [read_header(file) for file in weight_files(folder / "unet")]
    known = [header for header in headers if header is not None]
    if not headers or len(known) < len(headers):
        return None
    return Header({key: shape for header in known for key, shape in header.shapes.items()})


def check_model_files(flag: str, checkpoint: str | Path | None, config: Mapping[str, Any],
                      vae: str | Path | None = None, text_encoder: str | Path | Sequence[str | Path] | None = None
                      ) -> None:
    """Check, as `check_checkpoint` does, the file that a flag or the config itself names, and those of single parts.

    Args:
        config: the model's config as plain values.
    """
    params = dict(_model_params(config))
    for name, own_flag, given in (("vae_path", "--vae", vae), ("text_encoder_path", "--text_encoder", text_encoder)):
        params[name] = given or params.get(name)
        for path in listed_paths(params[name] or ()):
            if not path.exists():
                raise UserError(f"{own_flag} {path}: no such file or folder")
    in_config = params.get("ckpt_path")
    if checkpoint is None and isinstance(in_config, str) and in_config:
        flag, checkpoint = "model.params.ckpt_path", in_config
    if checkpoint is not None:
        check_checkpoint(flag, checkpoint, {"model": {"params": params}})


def _check_parts(flag: str, path: str | Path, params: Mapping[str, Any], header: Header) -> None:
    """Raise UserError if a whole part of a latent diffusion model is missing and comes from no other file."""
    ignored = tuple(params.get("ignore_keys") or ())
    needed: list[str] = []
    if isinstance(params.get("first_stage_config"), Mapping) and not params.get("vae_path"):
        needed.append(FIRST_STAGE)
    encoder = params.get("cond_stage_config")
    if isinstance(encoder, Mapping) and not params.get("text_encoder_path"):
        needed += [CLIP_L, CLIP_G] if str(encoder.get("target")).endswith(TWO_ENCODERS) else [TEXT_ENCODER]
    needed = [prefix for prefix in needed if not prefix.startswith(ignored)]
    absent = [prefix for prefix in needed if not any(key.startswith(PART_STARTS[prefix]) for key in header.shapes)]
    # Class labels and other conditions may have encoders without weights.
    if absent and TEXT_ENCODER in absent and context_width(header.shapes) is None:
        absent.remove(TEXT_ENCODER)
    if absent and any(key.startswith(DIFFUSION_PREFIXES) for key in header.shapes):
        raise UserError(f"{flag} {path}: {absence_message(absent, alone=absent == needed and len(absent) > 1)}")


def _config_width(params: Mapping[str, Any]) -> int | None:
    unet = params["unet_config"]
    unet_params = (unet.get("params") or {}) if isinstance(unet, Mapping) else {}
    width = unet_params.get("context_dim")
    width = width[0] if isinstance(width, list) and width else width
    return width if isinstance(width, int) else None


def _model_params(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    model = (config or {}).get("model")
    params = model.get("params") if isinstance(model, Mapping) else None
    return params if isinstance(params, Mapping) else {}
