"""Models whose weights come from a file, built without drawing the random numbers that the file replaces.

Drawing them takes longer than reading the file: 15 of 20 seconds for Stable Diffusion 1.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
# By name, since `transformers` has functions of these names around torch's own.
FILLS = frozenset({"normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"})
OVERWRITES = frozenset({"constant_", "copy_", "fill_", "zero_"})
# Neither read nor write numbers: properties such as `shape` and `data`, and other views of the same storage.
HARMLESS = frozenset({"__get__", "__set__", "_set_grad_enabled", "detach", "dim", "element_size", "is_complex",
                      "is_contiguous", "is_floating_point", "numel", "requires_grad_", "size", "stride",
                      "untyped_storage"})


class DeferredInit(TorchFunctionMode):
    """While it is active, a tensor that is to be filled at random is filled only when something reads it.

    What overwrites such a tensor, as loading a checkpoint does, comes in place of its random numbers. The rest is
    filled at the end, so that no tensor is ever found without numbers. Every function that is not known to be harmless
    counts as reading, so that what is not foreseen here costs time and nothing else.

        with DrawnWhenNeeded():
            model = instantiate_from_config(config)  # loads its checkpoint, or not
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, list[Callable[[], Any]]] = {}  # what fills the storage at an address, in this order

    def __torch_function__(self, function: Function, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in HARMLESS or not (self._waiting or name in FILLS):
            return function(*args, **kwargs)
        target = args[0] if args else kwargs.get("tensor")  # which is what `torch.nn.init` calls it
        whole = name in FILLS | OVERWRITES and isinstance(target, Tensor) and _is_whole(target)
        others = (args[1:], {key: value for key, value in kwargs.items() if key != "tensor"})
        self._fill(map(_address, _tensors(others if whole else (args, kwargs))))
        if whole:
            self._waiting.pop(_address(target), None)
        if name in FILLS and _can_wait(target, kwargs):
            self._wait(target, function, args, kwargs)
            return target
        return function(*args, **kwargs)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            self._fill(list(self._waiting))

    def _wait(self, target: Tensor, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the call for later; on a view of its own, which holds the storage whatever becomes of `target`."""
        view = target.detach()
        given = ((view, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "tensor": view})
        self._waiting.setdefault(_address(view), []).append(lambda: function(*given[0], **given[1]))

    def _fill(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            for fill in self._waiting.pop(address, ()):
                fill()


def _can_wait(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a fill may come later: not with numbers of a generator of its own, whose order counts, nor for a tensor
    without storage, nor for one that `transformers` has marked as loaded, which its functions leave as it is."""
    return (isinstance(target, Tensor) and kwargs.get("generator") is None and _address(target) != 0
            and not getattr(target, "_is_hf_initialized", False))


def _address(tensor: Tensor) -> int:
    """Where the storage of a tensor is, 0 where it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    return tensor.layout == torch.strided and tensor.nbytes == tensor.untyped_storage().nbytes()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, in lists and the like too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
