"""Load weights into models from .ckpt, .safetensors and diffusers folders, without running any of their content.

Public checkpoints may hold two sets of a network's weights: those at the end of training, and their moving averages
(`model_ema.*`), which generate better images. A model that keeps no averages (`use_ema: false`, and every model that is
loaded to sample or to train a concept) gets the averages as its weights, as if it were loaded from the "emaonly" file.
A model that keeps averages, because it is trained further, gets both. `ignore_keys: [model_ema.]` ignores the averages.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.deferred_init import DeferredInit
from ldm.checkpoints.diffusers_folder import parameterization_of, read_folder, under_own_names
from ldm.checkpoints.diffusers_names import open_clip_tensors
from ldm.checkpoints.families import identify_family
from ldm.checkpoints.packed_tables import unpack_tables
from ldm.checkpoints.pickled import printable, read_pickled
from ldm.common.errors import UserError
from ldm.common.files import load_tensors
from ldm.common.paths import resolve_path
from ldm.util import get_obj_from_str, instantiate_from_config, known_params

log = logging.getLogger(__name__)

Adapt = Callable[[str, Tensor, Tensor], Tensor]
AVERAGES = "model_ema."
WRONG_DTYPE = "of numbers"  # the beginning of such a problem's description
# Keys of public checkpoints that no model here reads, by beginning and end: copies of EMA, loss networks of
# autoencoders, and buffers that `transformers` and `open_clip` once saved.
UNREAD_PREFIXES = (AVERAGES, "first_stage_model.loss.", "loss.")
UNREAD_SUFFIXES = ("position_ids", "attn_mask")
PART_PREFIXES = ("model.", "model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
TEXT_ENCODER = "cond_stage_model."
# The prefix of a CLIP text tower's keys in CompVis's files, in later ones, and in those of Stable Diffusion 2
TOWER, SHORT_TOWER = "transformer.text_model.", "transformer."
CLIP = TEXT_ENCODER + TOWER
OPEN_CLIP = f"{TEXT_ENCODER}model."


# Reading


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint file or diffusers folder under CompVis's names, on the CPU.

    They are memory-mapped if the format allows it: unused tensors are not read.

    Raises:
        UserError: if the file is missing, incomplete, not a checkpoint, or holds objects whose code would have to run.
    """
    path = resolve_path(path)
    if path.is_dir():
        return read_folder(path, _read_file)
    return under_own_names(_read_file(path))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return unpack_tables(load_tensors(path)[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return unpack_tables(_extract_tensors(read_pickled(path), path))


def _extract_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled checkpoint, which may be inside a `state_dict`."""
    if isinstance(content, Mapping) and "string_to_param" in content:
        raise UserError(f"{path}: is a Textual Inversion embedding, not a model; "
                        "give the checkpoint of the base model that it was made for")
    inner = content.get("state_dict", content) if isinstance(content, Mapping) else None
    items = inner.items() if isinstance(inner, Mapping) else ()
    tensors = {str(key): value.detach() for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no weights; choose another file")
    return tensors


# Loading


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (),
                 optional_keys: Sequence[str] = (), adapt: Adapt | None = None) -> set[str]:
    """Load a checkpoint file or diffusers folder into `module`.

    Weights of any floating-point dtype are converted to the module's. From a whole model's checkpoint a part takes its
    own weights.

    Args:
        ignore_keys: beginnings of keys that are neither required nor loaded.
        optional_keys: beginnings of keys that the file may lack; a warning lists those that it does.
        adapt: called as (key, the file's tensor, the module's) where both have the key; returns what to load.

    Returns:
        The keys of the module that were loaded.

    Raises:
        UserError: if keys are missing, or shapes or dtypes do not fit. The module is unchanged then.
    """
    ignored = tuple(ignore_keys)
    required = {key: value for key, value in module.state_dict().items() if not key.startswith(ignored)}
    stored = {key: value for key, value in read_state_dict(path).items() if not key.startswith(ignored)}
    # Bring the file's tensors under the module's keys.
    keeps_averages = any(key.startswith(AVERAGES) for key in required)
    averages = {} if keeps_averages else moving_averages(stored)
    tensors = _rename_text_encoder(_select_part(stored | averages, required), required)
    if adapt is not None:
        tensors |= {key: adapt(key, tensors[key], required[key]) for key in required if key in tensors}
    # Compare them with what the module needs.
    unread = _unread_prefixes(module)
    absent = [key for key in required if key not in tensors and not _is_unread(key, unread)]
    missing = [key for key in absent if not key.startswith(tuple(optional_keys))]
    unexpected = [key for key in tensors if key not in required and not _is_unread(key, unread)]
    problems = {key: _find_problem(tensors[key], required[key]) for key in required if key in tensors}
    fitting = {key: tensors[key] for key, problem in problems.items() if problem is None}
    misfits = {key: problem for key, problem in problems.items() if problem and not _is_unread(key, unread)}
    if missing or misfits:
        raise UserError(f"{path}: does not fit this config: {_list_keys(missing, 'missing')}, "
                        f"{_list_keys(unexpected, 'unexpected')}, {_list_misfits(misfits)}; "
                        f"{_remedy(stored, required, misfits)}")
    module.load_state_dict(fitting, strict=False)
    if averages:
        log.info("%s: using the moving averages of %d weights", path, len(averages))
    if unexpected:
        log.warning("%s: %s, ignored", path, _list_keys(unexpected, "unexpected"))
    if absent:
        log.warning("%s: %s, which keep their values", path, _list_keys(absent, "missing"))
    _warn_if_images_will_be_noise(module, {key: required[key] for key in fitting}, Path(path))
    return set(fitting)


def moving_averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moving averages in a checkpoint under the names of their weights."""
    averages: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        average = tensors.get(AVERAGES + key.removeprefix("model.").replace(".", ""))
        if average is not None and average.shape == tensor.shape:
            averages[key] = average
    return averages


def _select_part(tensors: dict[str, Tensor], required: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the module's own keys if they are a whole model's and the module is a part of it."""
    for prefix in ("", *PART_PREFIXES):
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if part.keys() & required.keys():
            return part
    return tensors


def _rename_text_encoder(tensors: dict[str, Tensor], required: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _unread_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of keys that `module` does not need: those that nobody reads, and its parts' own."""
    own = [f"{name}.{key}".lstrip(".") for name, part in module.named_modules()
           for key in getattr(part, "unread_keys", ())]
    return (*UNREAD_PREFIXES, *own)


def _is_unread(key: str, prefixes: tuple[str, ...]) -> bool:
    return key.startswith(prefixes) or key.endswith(UNREAD_SUFFIXES)


# Problems


def _find_problem(tensor: Tensor, required: Tensor) -> str | None:
    """Return why `tensor` cannot become the module's, its shape or its dtype; None if it can."""
    if tensor.shape != required.shape:
        return f"{tuple(tensor.shape)} for {tuple(required.shape)}"
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or (required.is_floating_point() and not tensor.is_floating_point()):
        return f"{WRONG_DTYPE} {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _list_keys(keys: Sequence[str], what: str) -> str:
    """Return the number of keys, what is wrong with them, and the first three."""
    examples = ", ".join(map(printable, keys[:3])) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} keys {what}" + (f" ({examples})" if keys else "")


def _list_misfits(misfits: Mapping[str, str]) -> str:
    wrong_dtype = [f"{key} {problem}" for key, problem in misfits.items() if problem.startswith(WRONG_DTYPE)]
    wrong_shape = [f"{key} {problem}" for key, problem in misfits.items() if not problem.startswith(WRONG_DTYPE)]
    shapes = _list_keys(wrong_shape, "of another shape")
    return f"{shapes}, {_list_keys(wrong_dtype, 'that are no weights')}" if wrong_dtype else shapes


def _remedy(stored: Mapping[str, Tensor], required: Mapping[str, Tensor], misfits: Mapping[str, str]) -> str:
    if any(problem.startswith(WRONG_DTYPE) for problem in misfits.values()):
        return "choose a checkpoint of 16- or 32-bit weights"
    theirs = identify_family({key: value.shape for key, value in stored.items()})
    ours = identify_family({key: value.shape for key, value in required.items()})
    if theirs is None or theirs == ours:
        return "choose the config of this checkpoint's model"
    return f"it looks like {theirs.name}: {theirs.advice}"


def _warn_if_images_will_be_noise(module: nn.Module, loaded: Mapping[str, Tensor], path: Path) -> None:
    broken = [key for key, value in loaded.items() if not _is_finite(value)]
    if broken:
        log.warning("warning: %s: %s; images will be black or noise, so copy or download it again", path,
                    _list_keys(broken, "hold numbers that are not finite"))
    theirs, ours = parameterization_of(path), getattr(module, "parameterization", None)
    if theirs and ours and theirs != ours:
        log.warning("warning: %s: its scheduler says that the model predicts %s, the config (parameterization) %s; "
                    "images will be noise if the config is wrong", path, theirs, ours)


def _is_finite(values: Tensor) -> bool:
    """Return whether all values are finite, without allocating a second tensor of their size."""
    return not values.numel() or not values.is_floating_point() or all(map(torch.isfinite, values.aminmax()))


def load_model(config: Mapping[str, Any], checkpoint: str | Path | None = None,
               device: torch.device | str = "cpu") -> Any:
    """Build `config["model"]` with the weights of a checkpoint, frozen and ready to sample.

    It keeps no averages beside the weights, since nothing is trained: if the file has averages, they are the weights.

    Args:
        checkpoint: a .ckpt or .safetensors file or a diffusers folder; None: the config's own `ckpt_path`.

    Raises:
        UserError: if the config has no model, there are no weights to load, or they do not fit.
    """
    if "model" not in config:
        raise UserError("config: has no section `model`; give one that describes a model")
    section = {key: config["model"][key] for key in ("target", "params") if key in config["model"]}
    extra: dict[str, Any] = {} if checkpoint is None else {"ckpt_path": str(checkpoint)}
    if checkpoint is None and not (section.get("params") or {}).get("ckpt_path"):
        raise UserError("no base model: name its checkpoint with --ckpt, or in the config as model.params.ckpt_path")
    if "target" in section and "use_ema" in known_params(get_obj_from_str(section["target"])):
        extra["use_ema"] = False
    with DeferredInit():
        model = instantiate_from_config(section, **extra)
    return model.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
