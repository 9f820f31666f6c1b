"""Write files atomically, and read and write tensors as safetensors, which runs none of a file's content.

Importing this loads no torch: command lines that write no tensors do not wait for it.
"""
from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ldm.common.errors import UserError

if TYPE_CHECKING:
    import torch

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Call `write` with a temporary path in the same folder, then rename the result to `path`.

    An interruption at any point leaves either the old file or the new one, never a part of one.

    Raises:
        UserError: if the folder cannot be created or written to, or the disk is full.
    """
    path = Path(path)
    temporary = _create_temporary_file(path)
    try:
        with _report_write_errors(path):
            write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _create_temporary_file(path: Path) -> Path:
    """Create an empty file beside `path` with the permissions that new files have (by the umask), and its suffix.

    `tempfile.mkstemp` makes files that only their owner may read. To mend that, one would have to know the umask, which
    no thread can read without changing it for all others.
    """
    with _report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
            try:
                os.close(os.open(temporary, NEW_FILE, 0o666))
            except FileExistsError:
                continue
            return temporary


@contextlib.contextmanager
def _report_write_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError that names the file and the system's reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free some space or choose another folder") from None


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> Path:
    """Write a safetensors file. Each value of `metadata` is stored as JSON text under its key."""
    from safetensors.torch import save_file

    plain = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    return write_atomically(path, lambda temporary: save_file(plain, str(temporary), metadata=texts))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Read the tensors (on the CPU) and the metadata of a safetensors file. Metadata that is JSON is parsed.

    Raises:
        UserError: if the file is missing, incomplete, or not a safetensors file.
    """
    with _open_safetensors(Path(path)) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, _parse_metadata(file)


def load_metadata(path: str | Path) -> dict[str, object]:
    """Read only the metadata of a safetensors file, as `load_tensors` returns it.

    Raises:
        UserError: if the file is missing, incomplete, or not a safetensors file.
    """
    with _open_safetensors(Path(path)) as file:
        return _parse_metadata(file)


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); copy or make it again") from None


def _parse_metadata(file: Any) -> dict[str, object]:
    return {key: _parse_json(text) for key, text in (file.metadata() or {}).items()}


def _parse_json(text: str) -> object:
    """Return the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        return text
