"""Load initial weights when an object is completely constructed, whichever subclass it belongs to."""
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

Constructor = Callable[..., None]


class LoadsInitialWeights:
    """Mixin for modules that start from a checkpoint. Constructing one ends with `load_initial_weights`.

    The call comes after the outermost constructor: a subclass, also one from outside this project, gets weights for
    the parts that its own constructor adds. The checkpoint may lack these, and only these. A constructor that needs
    the weights earlier calls `load_initial_weights` itself.

    A class of this mixin implements `init_from_ckpt`, and its constructor calls `set_initial_weights` at its end. A
    subclass may override `init_from_ckpt`.

    Attributes:
        has_initial_weights: whether the weights come from a checkpoint, whichever method loaded it.
    """

    has_initial_weights = False
    _initial_weights_loaded = False
    _loads_initial_weights = False
    _under_construction = False
    _initial_weights: tuple[str | Path | None, dict[str, Any]] = (None, {})
    _required_parts: Set[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _finish_construction_after(cls.__init__)

    def set_initial_weights(self, path: str | Path | None, **options: Any) -> None:
        """Remember what to load, and which parts the model has now.

        Args:
            path: checkpoint, or None for no initial weights.
            options: further arguments for `init_from_ckpt`.
        """
        self._initial_weights = (path, options)
        self.require_present_parts()

    @property
    def initial_weights_path(self) -> str | Path | None:
        """The checkpoint of the initial weights, or None."""
        return self._initial_weights[0]

    def require_present_parts(self) -> None:
        """From now on, the checkpoint must hold the parts that the model has now."""
        self._required_parts = _parts(self)

    def load_initial_weights(self) -> None:
        """Load the initial weights unless this was done before."""
        path, options = self._initial_weights
        if self._initial_weights_loaded or path is None:
            return
        self._initial_weights_loaded = self._loads_initial_weights = True
        try:
            self.init_from_ckpt(path, **options)
        finally:
            self._loads_initial_weights = False

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
        """Load a checkpoint without the keys that begin with one of `ignore_keys`."""
        raise NotImplementedError

    def optional_keys(self) -> tuple[str, ...]:
        """Return beginnings of keys that a checkpoint may lack: any if a user loads it, some for initial weights."""
        if not self._loads_initial_weights:
            return ("",)
        own = {*self._parameters, *self._buffers}
        return tuple(part if part in own else f"{part}." for part in _parts(self) - self._required_parts)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as `nn.Module` does, and note that there are some."""
        self.has_initial_weights = True
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _finish_construction(self) -> None:
        """Do what follows the outermost constructor."""
        self.load_initial_weights()


def _parts(module: LoadsInitialWeights) -> Set[str]:
    """Return the names of the module's own parts, parameters and buffers that checkpoints hold."""
    return {key.partition(".")[0] for key in module.state_dict()}


def _finish_construction_after(constructor: Constructor) -> Constructor:
    """Wrap a constructor so that `_finish_construction` follows if no other wrapped constructor called it."""

    @functools.wraps(constructor)
    def wrapped(self: LoadsInitialWeights, *args: Any, **kwargs: Any) -> None:
        if self._under_construction:
            constructor(self, *args, **kwargs)
            return
        self._under_construction = True
        constructor(self, *args, **kwargs)
        self._under_construction = False
        self._finish_construction()

    return wrapped
