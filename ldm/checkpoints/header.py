"""Read the names and shapes of a checkpoint's tensors without reading them, and without torch.

So a command can say within a second that a file is not what it needs. Nothing of a file's content is executed.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoints.pickled_header import TensorShape, read_pickled_header
from ldm.checkpoints.wrappings import strip_wrappers, unwrap_weights
from ldm.common.errors import UserError
from ldm.common.file_formats import Format, check_format


@dataclass(frozen=True)
class Header:
    """What a file says about its content.

    Attributes:
        shapes: name -> shape of every tensor, under the names that remain after `strip_wrappers`.
        metadata: the metadata of a safetensors file.
        content: all that a pickled file holds, tensors as `TensorShape` and objects as stand-ins; None otherwise.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    content: Any = None


def read_header(path: Path) -> Header | None:
    """Return the header of a file, or None if it is damaged; reading the file then says how.

    Raises:
        UserError: the file is missing, or is something else altogether, such as a web page.
    """
    found = check_format(path)
    try:
        if found is Format.SAFETENSORS:
            return _read_safetensors_header(path)
        if found is Format.UNKNOWN:
            return None
        content = read_pickled_header(path, found)
    except UserError:
        raise
    except Exception:  # a damaged file can raise almost anything
        return None
    weights = unwrap_weights(content, lambda value: isinstance(value, TensorShape))
    return Header(strip_wrappers({key: tuple(shape) for key, shape in weights.items()}), {}, content)


def _read_safetensors_header(path: Path) -> Header:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", None) or {}
    return Header(strip_wrappers({key: tuple(entry["shape"]) for key, entry in entries.items()}), metadata)
