"""Weights from files into models: .ckpt, .safetensors and diffusers folders, without running anything they contain.

Public checkpoints may hold two sets of a network's weights: those that training ended with, and their moving averages
(`model_ema.*`), which draw better. A model that keeps no averages of its own (`use_ema: false`, and every model that is
loaded to sample or to teach a concept) gets the averages as its weights, as if it were loaded from the "emaonly" file.
A model that keeps averages, to be trained on, gets both. `ignore_keys: [model_ema.]` leaves the averages alone.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
from ldm.util import get_obj_from_str, instantiate_from_config, known_params

log = logging.getLogger(__name__)

AVERAGES = "model_ema."
NUMBERS = "of numbers"
# Keys that public checkpoints carry and no model here reads: EMA's copies and the loss networks of autoencoders (by how
# they begin), and buffers that `transformers` and `open_clip` once saved (by how they end).
UNREAD_BEGINNINGS = (AVERAGES, "first_stage_model.loss.", "loss.")
UNREAD_ENDINGS = ("position_ids", "attn_mask")
PARTS = ("model.", "model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
TEXT = "cond_stage_model."
TOWER, SHORT_TOWER = "transformer.text_model.", "transformer."  # in CompVis's files and in later ones
CLIP = TEXT + TOWER
OPEN_CLIP = f"{TEXT}model."  # in those of Stable Diffusion 2


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file or diffusers folder by CompVis's names, on the CPU.

    They are mapped from the disk where the format allows that: what is not used is not read.

    Raises:
        UserError: the file is missing, cut off, no checkpoint, or holds things that would have to be run.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, _read_file)
    return under_own_names(_read_file(path))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return unpack_tables(load_tensors(path)[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return unpack_tables(_tensors_of(read_pickled(path), path))


def _tensors_of(loaded: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and "string_to_param" in loaded:
        raise UserError(f"{path}: holds no model, but a Textual Inversion embedding; "
                        "give the checkpoint of the base model that it was made for")
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    items = inner.items() if isinstance(inner, Mapping) else ()
    tensors = {str(key): value.detach() for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no weights; choose another file")
    return tensors


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> set[str]:
    """Loads a file or diffusers folder into `module`; keys that begin with one of `ignore_keys` are passed over.

    Weights of any floating-point precision are brought to the module's own. Of the checkpoint of a whole model a part
    takes its own weights.

    Returns:
        The module's keys that were loaded.

    Raises:
        UserError: keys that the module needs are missing, or shapes or kinds of numbers differ; nothing has been
            changed then.
    """
    ignored = tuple(ignore_keys)
    wanted = {key: value for key, value in module.state_dict().items() if not key.startswith(ignored)}
    found = {key: value for key, value in read_state_dict(path).items() if not key.startswith(ignored)}
    keeps_averages = any(key.startswith(AVERAGES) for key in wanted)
    averages = {} if keeps_averages else moving_averages(found)
    tensors = _spelt(_part(found | averages, wanted), wanted)
    unread = _unread_beginnings(module)
    missing = [key for key in wanted if key not in tensors and not _is_unread(key, unread)]
    unexpected = [key for key in tensors if key not in wanted and not _is_unread(key, unread)]
    fitting = {key: value for key, value in tensors.items() if key in wanted and not _misfit(value, wanted[key])}
    misfits = {key: _misfit(tensors[key], wanted[key]) for key in wanted
               if key in tensors and key not in fitting and not _is_unread(key, unread)}
    if missing or misfits:
        raise UserError(f"{path}: does not fit this config: {_counted(missing, 'missing')}, "
                        f"{_counted(unexpected, 'unexpected')}, {_misfits(misfits)}; {_remedy(found, wanted, misfits)}")
    module.load_state_dict(fitting, strict=False)
    if averages:
        log.info("%s: has the averages of %d weights, which are taken in place of the last ones", path, len(averages))
    if unexpected:
        log.warning("%s: %s, left out", path, _counted(unexpected, "unexpected"))
    _warn_of_what_draws_noise(module, {key: wanted[key] for key in fitting}, Path(path))
    return set(fitting)


def moving_averages(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moving averages in a checkpoint under their weights' own names."""
    names = {key: AVERAGES + key.removeprefix("model.").replace(".", "") for key in found}
    return {key: found[name] for key, name in names.items()
            if name in found and found[name].shape == found[key].shape}


def _part(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the module's own names, where `found` is a whole model of which the module is a part."""
    for start in ("", *PARTS):
        part = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
        if part.keys() & wanted.keys():
            return part
    return found


def _spelt(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the text encoder's names as the module has them; files have it in three spellings."""
    longer = {key: place + TOWER + key.removeprefix(place + SHORT_TOWER) for place in ("", TEXT) for key in found
              if key.startswith(place + SHORT_TOWER)}
    found = {new if key not in wanted and (new := longer.get(key, key)) in wanted else key: value
             for key, value in found.items()}
    tower = {key.removeprefix(CLIP): value for key, value in found.items()
             if key.startswith(CLIP) and not key.endswith(UNREAD_ENDINGS)}
    if not tower or not any(key.startswith(f"{OPEN_CLIP}transformer.") for key in wanted):
        return found
    others = {key: value for key, value in found.items() if not key.startswith(CLIP)}
    return others | {OPEN_CLIP + key: value for key, value in open_clip_tensors(tower).items()}


def _unread_beginnings(module: nn.Module) -> tuple[str, ...]:
    """How keys begin that `module` works without: those nobody reads, and what its parts say of themselves."""
    own = (f"{name}.{key}".lstrip(".") for name, part in module.named_modules()
           for key in getattr(part, "unread_keys", ()))
    return (*UNREAD_BEGINNINGS, *own)


def _is_unread(key: str, beginnings: tuple[str, ...]) -> bool:
    return key.startswith(beginnings) or key.endswith(UNREAD_ENDINGS)


def _misfit(tensor: Tensor, wanted: Tensor) -> str | None:
    """What keeps `tensor` from becoming the module's: both shapes, or the kind of numbers it holds."""
    if tensor.shape != wanted.shape:
        return f"{tuple(tensor.shape)} for {tuple(wanted.shape)}"
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or (wanted.is_floating_point() and not tensor.is_floating_point()):
        return f"{NUMBERS} {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _misfits(problems: Mapping[str, str]) -> str:
    """What a message says of them; of kinds of numbers only where there are such."""
    odd = [f"{key} {problem}" for key, problem in problems.items() if problem.startswith(NUMBERS)]
    misshapen = [f"{key} {problem}" for key, problem in problems.items() if not problem.startswith(NUMBERS)]
    said = _counted(misshapen, "of another shape")
    return f"{said}, {_counted(odd, 'that are no weights')}" if odd else said


def _counted(keys: Sequence[str], what: str) -> str:
    shown = ", ".join(map(printable, keys[:3])) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} keys {what}" + (f" ({shown})" if keys else "")


def _remedy(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], misfits: Mapping[str, str]) -> str:
    if any(problem.startswith(NUMBERS) for problem in misfits.values()):
        return "choose a checkpoint of 16- or 32-bit weights"
    theirs, ours = (identify_family({key: value.shape for key, value in tensors.items()}) for tensors in (found, wanted))
    if theirs is None or theirs == ours:
        return "choose the config of this checkpoint's model"
    return f"it looks like {theirs.name}: {theirs.advice}"


def _warn_of_what_draws_noise(module: nn.Module, loaded: Mapping[str, Tensor], path: Path) -> None:
    broken = [key for key, value in loaded.items() if not _is_finite(value)]
    if broken:
        log.warning("warning: %s: %s; pictures will be black or noise, so copy or download it again", path,
                    _counted(broken, "hold numbers that are not finite"))
    theirs, ours = parameterization_of(path), getattr(module, "parameterization", None)
    if theirs and ours and theirs != ours:
        log.warning("warning: %s: its scheduler says that the model predicts %s, the config (parameterization) %s; "
                    "pictures will be noise where the config is wrong", path, theirs, ours)


def _is_finite(values: Tensor) -> bool:
    """Whether all are; without a second array of their size."""
    return not values.numel() or not values.is_floating_point() or all(map(torch.isfinite, values.aminmax()))


def load_model(config: Mapping[str, Any], checkpoint: str | Path | None = None,
               device: torch.device | str = "cpu") -> Any:
    """Builds `config["model"]` with the weights of `checkpoint`, or of the config's own `ckpt_path`, ready to sample.

    The checkpoint is a .ckpt, a .safetensors or a diffusers folder. No averages are kept beside the weights, since
    nothing is trained: where the file has them, they are the weights.

    Raises:
        UserError: the config has no model, there are no weights to load, or they do not fit.
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
