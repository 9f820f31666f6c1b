"""Load initial weights when an object is completely constructed, whichever subclass it belongs to."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Constructor = Callable[..., None]


class LoadsInitialWeights:
    """Mixin for modules that start from a checkpoint. Constructing one ends with `load_initial_weights`.

    The call comes after the outermost constructor: a subclass, also one from outside this project, gets weights for
    the parts that its own constructor adds. A constructor that needs the weights earlier calls `load_initial_weights`
    itself.
    """

    _initial_weights_loaded = False
    _under_construction = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _finish_construction_after(cls.__init__)

    def load_initial_weights(self) -> None:
        """Load the initial weights unless this was done before."""
        if not self._initial_weights_loaded:
            self._initial_weights_loaded = True
            self._load_initial_weights()

    def _load_initial_weights(self) -> None:
        """Load the weights. A subclass of this mixin implements it."""
        raise NotImplementedError

    def _finish_construction(self) -> None:
        """Do what follows the outermost constructor."""
        self.load_initial_weights()


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
