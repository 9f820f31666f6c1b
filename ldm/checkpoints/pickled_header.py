"""Read what a file of `torch.save` holds, with the shapes of its tensors in their place, without torch.

Unpickling calls nothing that a file names: every class and function of it is replaced by an inert stand-in of this
module.
"""
from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.common.file_formats import Format

MAX_PICKLE = 2**28  # bytes; that of Stable Diffusion takes less than one megabyte
PICKLES_BEFORE_CONTENT = 3  # in the legacy format: a magic number, the version and the machine


class TensorShape(tuple):
    """The shape of a tensor, in place of the tensor."""

    __slots__ = ()


class StandIn:
    """Stands in for any object of a file: it takes arguments, state and items, and ignores most of them.

    Attributes:
        state: the state that the file gives the object.
        items: those of an object that is filled like a dictionary.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None
        self.items: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return StandIn()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Ignore an item of a list."""

    def extend(self, values: Any) -> None:
        """Ignore items of a list."""


def _tensor(storage: Any, offset: Any, size: Any = (), *rest: Any) -> Any:
    return TensorShape(size) if isinstance(size, tuple) else StandIn()


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": TensorShape,
}


class _HeaderUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return KNOWN.get(f"{module}.{name}", StandIn)

    def persistent_load(self, pid: Any) -> Any:
        return StandIn()  # the storage of a tensor


def read_pickled_header(path: Path, found: Format) -> Any:
    """Return the content of a file, with a `TensorShape` for each tensor and a `StandIn` for each other object.

    Args:
        found: its format, ZIP or PICKLE.

    Raises:
        Exception: of any type, if the file is damaged.
    """
    if found is Format.ZIP:
        return _HeaderUnpickler(io.BytesIO(_pickle_in_zip(path))).load()
    with path.open("rb") as file:
        for _ in range(PICKLES_BEFORE_CONTENT):
            first = _HeaderUnpickler(file).load()
            if not isinstance(first, int | dict):  # a bare pickle
                return first
        return _HeaderUnpickler(file).load()


def _pickle_in_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        part = next(part for part in archive.infolist() if part.filename.rpartition("/")[2] == "data.pkl")
        if part.compress_type != zipfile.ZIP_STORED or part.file_size > MAX_PICKLE:
            raise ValueError("not written by torch.save")
        return archive.read(part)
