"""Files that are whole or not there at all, and checkpoints that are read without running anything they contain."""
from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.common.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Calls `write` with a temporary path in the same folder, then renames the result to `path`.

    An interruption at any point leaves either the old file or the new one, never a part of one.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    aside = _empty_file_beside(path)
    try:
        with _unwritable(path):
            write(aside)
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)  # mkstemp makes files that only their owner may read
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _empty_file_beside(path: Path) -> Path:
    with _unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    """Says which file could not be written, and why, where the system says it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); make room there, or choose another place") from None


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> Path:
    """Writes a safetensors file; each value of `metadata` is stored as JSON text under its key."""
    plain = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    return write_atomically(path, lambda aside: save_file(plain, str(aside), metadata=texts))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Reads what `save_tensors` wrote: CPU tensors, and the metadata, parsed where it is JSON.

    Raises:
        UserError: the file is missing, cut off, or no safetensors file.
    """
    with _opened(Path(path)) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        return tensors, _metadata(opened)


def load_metadata(path: str | Path) -> dict[str, object]:
    """The metadata alone of what `save_tensors` wrote, parsed where it is JSON.

    Raises:
        UserError: as for `load_tensors`.
    """
    with _opened(Path(path)) as opened:
        return _metadata(opened)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); copy or make it again") from None


def _metadata(opened: Any) -> dict[str, object]:
    return {key: _parsed(text) for key, text in (opened.metadata() or {}).items()}


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter of brackets in brackets, thousands deep
        return text
