"""Freeze modules for good: they stay in evaluation mode whatever mode their parent is set to."""
from __future__ import annotations

from types import MethodType
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def disabled_train(self: Module, mode: bool = True) -> Module:
    """Leave the mode as it is. In place of a module's `train`, it keeps the module in evaluation mode."""
    return self


def freeze(module: Module) -> Module:
    """Put `module` into evaluation mode for good, without gradients, and return it."""
    module.eval().requires_grad_(False)
    module.train = MethodType(disabled_train, module)
    return module
