"""Import names of public modules on first access."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def forward_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a public module whose names are defined in other modules (PEP 562).

    A name is imported on first access. So importing the public module is free, and the module may belong to a lower
    layer than the one that it forwards to.

    Args:
        module: the public module's `__name__`.
        homes: name -> module that defines it.
    """

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return getattr_
