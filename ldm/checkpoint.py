"""Weights from files into models: .ckpt and .safetensors, without running anything that a file contains."""
from __future__ import annotations

import logging
import pickle
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.errors import UserError
from ldm.files import load_tensors
from ldm.modules.encoders.vocabulary import unpack_tables
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

# Keys that public checkpoints carry and no model here reads: EMA's copies and the loss networks of autoencoders (by how
# they begin), and buffers that `transformers` once saved (by how they end).
UNREAD_BEGINNINGS = ("model_ema.", "first_stage_model.loss.", "loss.")
UNREAD_ENDINGS = ("position_ids",)
# Public checkpoints hold, next to the weights, the state of the training run, made of classes of these packages.
RECORDS = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.", "_codecs.", "collections.", "typing.")
RECORD_TYPES = tuple(f"{module}.{name}" for module in ("builtins", "__builtin__")
                     for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple"))
# What reading something that is no checkpoint, or half of one, ends in: torch takes each byte for an instruction.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
              MemoryError, AssertionError, ImportError, struct.error)


class _Record:
    """Stands for whatever a training run noted down: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file by name, on the CPU.

    Raises:
        UserError: the file is missing, cut off, no checkpoint, or holds things that would have to be run.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return unpack_tables(load_tensors(path)[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_globals([(_Record, name) for name in _records_in(path)]), warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is no checkpoint, or holds more than weights, which is not run; "
                        "download it again or convert it to .safetensors") from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: cut off or no checkpoint ({reason}); copy or download it again") from None
    return unpack_tables(_tensors_of(loaded, path))


def _records_in(path: Path) -> list[str]:
    """The classes and functions that a checkpoint asks for besides weights, all of them of the training run's packages.

    Raises:
        UserError: it asks for others; none of them has been called.
    """
    try:
        wanted = sorted(get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # torch's formats from before version 1.6: loading them refuses everything of the kind
        return []
    others = [name for name in wanted if not name.startswith(RECORDS) and name not in RECORD_TYPES]
    if others:
        raise UserError(f"{path}: not loaded, since it holds more than weights (it asks for {', '.join(others[:3])}); "
                        "convert it to .safetensors")
    return wanted


def _tensors_of(loaded: Any, path: Path) -> dict[str, Tensor]:
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    items = inner.items() if isinstance(inner, Mapping) else ()
    tensors = {str(key): value.detach() for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no weights; choose another file")
    return tensors


def load_weights(module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
    """Loads a file into `module`; keys that begin with one of `ignore_keys` are passed over.

    Raises:
        UserError: keys that the module needs are missing, or shapes differ; nothing has been changed then.
    """
    ignored = tuple(ignore_keys)
    wanted = {key: value.shape for key, value in module.state_dict().items() if not key.startswith(ignored)}
    found = {key: value for key, value in read_state_dict(path).items() if not key.startswith(ignored)}
    tensors = {_spelt(key, wanted): value for key, value in found.items()}
    missing = [key for key in wanted if key not in tensors and not _is_unread(key)]
    unexpected = [key for key in tensors if key not in wanted and not _is_unread(key)]
    misshapen = [f"{key} {tuple(tensors[key].shape)} for {tuple(shape)}" for key, shape in wanted.items()
                 if key in tensors and tensors[key].shape != shape]
    if missing or misshapen:
        raise UserError(f"{path}: does not fit this config: {_counted(missing, 'missing')}, "
                        f"{_counted(unexpected, 'unexpected')}, {_counted(misshapen, 'of another shape')}; "
                        "choose the config of this checkpoint's model")
    module.load_state_dict(tensors, strict=False)
    if unexpected:
        log.warning("%s: %s, left out", path, _counted(unexpected, "unexpected"))


def _spelt(key: str, wanted: Mapping[str, Any]) -> str:
    """`key` as the module has it: newer files of CLIP's text tower leave out `text_model.`."""
    longer = key.replace("transformer.", "transformer.text_model.", 1)
    return longer if key not in wanted and longer in wanted else key


def _is_unread(key: str) -> bool:
    return key.startswith(UNREAD_BEGINNINGS) or key.endswith(UNREAD_ENDINGS)


def _counted(keys: Sequence[str], what: str) -> str:
    shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} keys {what}" + (f" ({shown})" if keys else "")


def load_model(config: Mapping[str, Any], checkpoint: str | Path | None = None,
               device: torch.device | str = "cpu") -> Any:
    """Builds `config["model"]` with the weights of `checkpoint`, or of the config's own `ckpt_path`, ready to sample.

    Raises:
        UserError: the config has no model, there are no weights to load, or they do not fit.
    """
    if "model" not in config:
        raise UserError("config: has no section `model`; give one that describes a model")
    section = {key: config["model"][key] for key in ("target", "params") if key in config["model"]}
    extra = {} if checkpoint is None else {"ckpt_path": str(checkpoint)}
    if checkpoint is None and not (section.get("params") or {}).get("ckpt_path"):
        raise UserError("no base model: name its checkpoint with --ckpt, or in the config as model.params.ckpt_path")
    model = instantiate_from_config(section, **extra)
    return model.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
