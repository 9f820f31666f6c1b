"""Read and write tensors as safetensors, which runs none of a file's content. Files are written atomically.

Importing this loads no torch: command lines that write no tensors do not wait for it.
"""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.file_formats import check_format
from ldm.common.paths import user_path

if TYPE_CHECKING:
    import torch

SAFETENSORS = ".safetensors"
HEADER_BYTES = 8  # that hold the length of the header, which is JSON
METADATA = "__metadata__"


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> Path:
    """Write a safetensors file. Each value of `metadata` is stored under its key: a text as it is, others as JSON.

    The same contents give the same bytes.
    """
    from safetensors.torch import save_file

    plain = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
             for key, value in metadata.items()}

    def write(temporary: Path) -> None:
        save_file(plain, str(temporary), metadata=texts)
        if len(texts) > 1:
            _sort_metadata(temporary)

    return write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by key: the library writes it in random order."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(HEADER_BYTES), "little")
        header = json.loads(file.read(length))
        header[METADATA] = dict(sorted(header[METADATA].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(content) <= length:  # always, since it is the same content in another order
            file.seek(HEADER_BYTES)
            file.write(content.ljust(length))


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
    path = user_path(path)
    check_format(path)
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
