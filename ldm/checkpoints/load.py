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
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.absent_parts import describe_absent_parts
from ldm.checkpoints.averages import AVERAGES, averages_alone, complete_averages
from ldm.checkpoints.deferred_init import DeferredInit
from ldm.checkpoints.families import identify_family
from ldm.checkpoints.other_kinds import Role, describe_unusable
from ldm.checkpoints.parts import Paths, replace_parts, select_part
from ldm.checkpoints.pickled import printable
from ldm.checkpoints.prediction import V_KEYS, prediction_remedy, stated_params, stated_prediction
from ldm.checkpoints.read import read_state_dict
from ldm.checkpoints.text_towers import UNREAD_PREFIXES as UNREAD_TOWER_PREFIXES
from ldm.checkpoints.text_towers import UNREAD_SUFFIXES, rename_text_encoders
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.util import get_obj_from_str, instantiate_from_config, known_params

log = logging.getLogger(__name__)

Adapt = Callable[[str, Tensor, Tensor], Tensor]
WRONG_DTYPE = "of numbers"  # the beginning of such a problem's description
# Keys of public checkpoints that no model here reads: copies of EMA, loss networks of autoencoders, the noise levels of
# Stable Diffusion XL, marks of other programs, and what single text encoders have besides
UNREAD_PREFIXES = (AVERAGES, "first_stage_model.loss.", "loss.", "denoiser.", "model_sampling.", *V_KEYS,
                   *UNREAD_TOWER_PREFIXES)


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (),
                 optional_keys: Sequence[str] = (), adapt: Adapt | None = None,
                 parts: Mapping[str, Paths] = MappingProxyType({})) -> set[str]:
    """Load a checkpoint file or diffusers folder into `module`.

    Weights of any floating-point dtype are converted to the module's. From a whole model's checkpoint a part takes its
    own weights.

    Args:
        ignore_keys: beginnings of keys that are neither required nor loaded.
        optional_keys: beginnings of keys that the file may lack; a warning lists those that it does.
        adapt: called as (key, the file's tensor, the module's) where both have the key; returns what to load.
        parts: prefix of a part's keys -> file or folder that this part is loaded from instead; for text encoders, one
            or several.

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
    both_sets = keeps_averages and not averages_alone(stored)
    averages = {} if both_sets else complete_averages(path, stored, required)
    tensors = replace_parts(select_part(stored | averages, required), required, parts)
    tensors = rename_text_encoders(tensors, required)
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
        raise UserError(f"{path}: {_describe_misfit(stored, tensors, required, missing, unexpected, misfits)}")
    module.load_state_dict(fitting, strict=False)
    if averages:
        log.info("%s: using the moving averages of %d weights", path, len(averages))
    if unexpected:
        log.warning("%s: %s, ignored", path, _list_keys(unexpected, "unexpected"))
    if absent:
        log.warning("%s: %s, which keep their values", path, _list_keys(absent, "missing"))
    _warn_if_images_will_be_noise(module, {key: required[key] for key in fitting}, resolve_path(path))
    return set(fitting)


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


def _describe_misfit(stored: Mapping[str, Tensor], tensors: Mapping[str, Tensor], required: Mapping[str, Tensor],
                     missing: Sequence[str], unexpected: Sequence[str], misfits: Mapping[str, str]) -> str:
    """Say what a file is that does not fit, or what is wrong with it, and the remedy.

    Args:
        stored: the file's tensors.
        tensors: these under the module's keys.
        required: the module's tensors.
        missing, unexpected: keys that only the module or only the file has.
        misfits: key -> problem.
    """
    theirs, ours = (identify_family({key: value.shape for key, value in one.items()}) for one in (stored, required))
    if theirs is not None and theirs.role not in (Role.BASE, Role.PART) and theirs != ours:
        return describe_unusable(theirs)
    if not misfits and (absence := describe_absent_parts(missing, required, tensors)):
        return absence
    problems = (f"does not fit this config: {_list_keys(missing, 'missing')}, {_list_keys(unexpected, 'unexpected')}, "
                f"{_list_misfits(misfits)}")
    if any(problem.startswith(WRONG_DTYPE) for problem in misfits.values()):
        return f"{problems}; choose a checkpoint of 16- or 32-bit weights"
    if theirs is None or theirs == ours:
        return f"{problems}; choose the config of this checkpoint's model"
    return f"{problems}; it looks like {theirs.name}: {theirs.advice}"


def _warn_if_images_will_be_noise(module: nn.Module, loaded: Mapping[str, Tensor], path: Path) -> None:
    broken = [key for key, value in loaded.items() if not _is_finite(value)]
    if broken:
        log.warning("warning: %s: %s; images will be black or noise, so copy or download it again", path,
                    _list_keys(broken, "hold numbers that are not finite"))
    stated, ours = stated_prediction(path), getattr(module, "parameterization", None)
    if stated is not None and ours and stated.kind != ours:
        log.warning("warning: %s: %s says that the model predicts %s, the config (parameterization) %s; images will be "
                    "noise if the config is wrong: %s", path, stated.source, stated.kind, ours,
                    prediction_remedy(stated.kind))


def _is_finite(values: Tensor) -> bool:
    """Return whether all values are finite, without allocating a second tensor of their size."""
    return not values.numel() or not values.is_floating_point() or all(map(torch.isfinite, values.aminmax()))


def params_of_checkpoint(section: Mapping[str, Any], checkpoint: str | Path | None = None) -> dict[str, Any]:
    """Return params of a diffusion model that its checkpoint states and its config leaves open; see `stated_params`.

    Args:
        section: `target` and `params` of the model.
        checkpoint: its weights; None: those of the params' `ckpt_path`.
    """
    params = section.get("params") or {}
    path = checkpoint or params.get("ckpt_path")
    known = known_params(get_obj_from_str(section["target"])) if path and "target" in section else ()
    return stated_params(params, known, path) if "parameterization" in known else {}


def load_model(config: Mapping[str, Any], checkpoint: str | Path | None = None, device: torch.device | str = "cpu",
               vae: str | Path | None = None, text_encoder: Paths | None = None) -> Any:
    """Build `config["model"]` with the weights of a checkpoint, frozen and ready to sample.

    What the file says about its network and the config leaves open, such as v-prediction, is used. The model keeps no
    averages beside the weights, since nothing is trained: if the file has averages, they are the weights.

    Args:
        checkpoint: a .ckpt or .safetensors file or a diffusers folder; None: the config's own `ckpt_path`.
        vae: file or folder to load the first stage from instead.
        text_encoder: one or more files or folders to load text encoders from instead.

    Raises:
        UserError: if the config has no model, there are no weights to load, or they do not fit.
    """
    if "model" not in config:
        raise UserError("config: has no section `model`; give one that describes a model")
    section = {key: config["model"][key] for key in ("target", "params") if key in config["model"]}
    extra: dict[str, Any] = {} if checkpoint is None else {"ckpt_path": str(checkpoint)}
    params = section.get("params") or {}
    if checkpoint is None and not params.get("ckpt_path"):
        raise UserError("no base model: name its checkpoint with --ckpt, or in the config as model.params.ckpt_path")
    known = known_params(get_obj_from_str(section["target"])) if "target" in section else ()
    if "use_ema" in known:
        extra["use_ema"] = False
    extra |= params_of_checkpoint(section, checkpoint)
    for flag, param, path in (("--vae", "vae_path", vae), ("--text_encoder", "text_encoder_path", text_encoder)):
        if path is not None and param not in known:
            raise UserError(f"{flag} {path}: {section.get('target')} of this config has no such part; leave it out")
        extra |= {} if path is None else {param: str(path) if isinstance(path, str | Path) else list(map(str, path))}
    with DeferredInit():
        model = instantiate_from_config(section, **extra)
    return model.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
