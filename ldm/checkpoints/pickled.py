"""Reads what `torch.save` wrote without running any of it, mapped from the disk where the format allows that."""
from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.common.errors import UserError

# Public checkpoints hold, next to the weights, the state of the training run, made of classes of these packages.
RECORDS = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.", "_codecs.", "collections.", "typing.",
           "argparse.", "pathlib.", "datetime.", "torch.nn.modules.", "torch.optim.")
RECORD_TYPES = tuple(f"{module}.{name}" for module in ("builtins", "__builtin__")
                     for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple"))
MAPPINGS = ("defaultdict", "AttributeDict")  # those of them that are filled as dictionaries are
# What reading something that is no checkpoint, or half of one, ends in: torch takes each byte for an instruction.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
              MemoryError, AssertionError, ImportError, struct.error, zipfile.BadZipFile)
ZIP_START = b"PK\x03\x04"
SHOWN_LETTERS = 100  # of a name or message that a file determines


class _Record:
    """Stands for whatever a training run noted down: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _MappingRecord:
    """The same for what is filled entry by entry, which torch only does to plain dictionaries."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


def read_pickled(path: Path) -> Any:
    """The contents of a file that `torch.save` wrote in any of its formats, tensors on the CPU.

    Tensors of the present (zip) format are read from the disk as they are used.

    Raises:
        UserError: the file is cut off, no checkpoint, or holds things that would have to be run.
    """
    try:
        in_zip = _is_zip(path)
        stand_ins = [(_stand_in(name), name) for name in _records_in(path)] if in_zip else []
        with safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=in_zip)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: is no checkpoint, or holds more than weights, which is not run; "
                        "download it again or convert it to .safetensors") from None
    except UNREADABLE as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{path}: cut off or no checkpoint ({reason}); copy or download it again") from None


def printable(text: str) -> str:
    """`text` of a file's own making, fit for a line of a message: not too long, nothing that moves the cursor."""
    shown = text[:SHOWN_LETTERS] + ("…" if len(text) > SHOWN_LETTERS else "")
    return shown if shown.isprintable() else ascii(shown)


def _is_zip(path: Path) -> bool:
    """Whether the file is of torch's present format; such a file stores its parts as they are.

    Raises:
        ValueError: its parts are compressed, which torch does not do, and which hides how large they will be.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return False
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("a compressed zip file")
    return True


def _records_in(path: Path) -> list[str]:
    """The classes and functions that a checkpoint asks for besides weights, all of them of the training run's packages.

    Raises:
        UserError: it asks for others; none of them has been called.
    """
    wanted = sorted(get_unsafe_globals_in_checkpoint(path))
    others = [name for name in wanted if not name.startswith(RECORDS) and name not in RECORD_TYPES]
    if others:
        raise UserError(f"{path}: not loaded, since it holds more than weights (it asks for "
                        f"{', '.join(map(printable, others[:3]))}); convert it to .safetensors")
    return wanted


def _stand_in(name: str) -> type:
    return _MappingRecord if name.rpartition(".")[2] in MAPPINGS else _Record
