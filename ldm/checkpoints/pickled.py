"""Read files that `torch.save` wrote without running any of their content, memory-mapped if the format allows it."""
from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.common.errors import UserError

# Public checkpoints contain weights and the state of the training run, which consists of classes of these packages.
TRAINING_PACKAGES = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.", "_codecs.", "collections.", "typing.",
                     "argparse.", "pathlib.", "datetime.", "torch.nn.modules.", "torch.optim.")
BUILTIN_TYPES = ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")
HARMLESS_NAMES = tuple(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in BUILTIN_TYPES)
MAPPINGS = ("defaultdict", "AttributeDict")  # classes of the training state that are filled like dictionaries
# What torch raises when it reads something that is not a checkpoint, or half of one: it takes each byte for an
# instruction.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
              MemoryError, AssertionError, ImportError, struct.error, zipfile.BadZipFile)
ZIP_START = b"PK\x03\x04"
PRINTED_CHARACTERS = 100  # of a name or message that comes from a file


class _Ignored:
    """Stands in for an object of the training state: accepts everything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _IgnoredMapping:
    """Stands in for a mapping of the training state. torch fills only plain dictionaries item by item."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


def read_pickled(path: Path, stand_ins: Mapping[str, type] = MappingProxyType({})) -> Any:
    """Return the content of a file that `torch.save` wrote in any of its formats, with tensors on the CPU.

    Tensors of the current (zip) format are read from the disk when they are used.

    Args:
        path: the file.
        stand_ins: full name of a class in the file -> class whose `__setstate__` takes the state of such objects.

    Raises:
        UserError: if the file is incomplete, not a checkpoint, or holds objects whose code would have to run.
    """
    try:
        in_zip = _is_zip(path)
        ignored = {name: _stand_in(name) for name in _training_state_in(path)} if in_zip else {}
        known = [(cls, name) for name, cls in {**ignored, **stand_ins}.items()]
        with safe_globals(known), warnings.catch_warnings(action="ignore"):
            return _load(path, in_zip)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is no checkpoint, or holds more than weights, which is not run; "
                        "download it again or convert it to .safetensors") from None
    except UNREADABLE as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{path}: cut off or no checkpoint ({reason}); copy or download it again") from None


def _load(path: Path, in_zip: bool) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=in_zip)
    with path.open("rb") as file:  # torch takes a file of this name for safetensors, whatever is in it
        return torch.load(file, map_location="cpu", weights_only=True)


def printable(text: str) -> str:
    """Return text from a file in a form that is safe in a one-line message: short, and without control characters."""
    short = text[:PRINTED_CHARACTERS] + ("…" if len(text) > PRINTED_CHARACTERS else "")
    return short if short.isprintable() else ascii(short)


def _is_zip(path: Path) -> bool:
    """Return whether the file has torch's current format, a zip archive of uncompressed parts.

    Raises:
        ValueError: if a part is compressed. torch never does that, and it hides how large the part will be.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return False
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("a compressed zip file")
    return True


def _training_state_in(path: Path) -> list[str]:
    """Return the names of the classes and functions that a checkpoint requires for its training state.

    Raises:
        UserError: if it requires others. None of them has been called.
    """
    required = sorted(get_unsafe_globals_in_checkpoint(path))
    others = [name for name in required if not name.startswith(TRAINING_PACKAGES) and name not in HARMLESS_NAMES]
    if others:
        raise UserError(f"{path}: not loaded, since it holds more than weights (it asks for "
                        f"{', '.join(map(printable, others[:3]))}); convert it to .safetensors")
    return required


def _stand_in(name: str) -> type:
    return _IgnoredMapping if name.rpartition(".")[2] in MAPPINGS else _Ignored
