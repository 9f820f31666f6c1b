"""An exponential moving average of a model's trained parameters."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Shadow copies of all parameters of `model` that require a gradient, kept as buffers.

    Buffers are called like the parameters with the dots left out, next to `decay` and `num_updates`, so that
    checkpoints of the public models load.

    Args:
        decay: weight of the past in each update, 0 .. 1.
        use_num_upates: start with a smaller decay, (1 + n) / (10 + n) at update n, so that the random start is soon
            forgotten. (The spelling is the public code's, since configs name it.)

    Raises:
        ValueError: decay is out of range, no parameter requires a gradient, or two parameters' names without dots
            are equal.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay {decay} is not between 0 and 1")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        self.buffer_names: dict[str, str] = {}
        self.collected: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._add(name, parameter)
        if not self.buffer_names:
            raise ValueError("EMA: no parameter of the model requires a gradient, so there is nothing to average")

    def _add(self, name: str, parameter: Tensor) -> None:
        short = name.replace(".", "")
        if short in self.buffer_names.values():
            raise ValueError(f"EMA: parameter {name} and another one have the same name without dots, {short}")
        self.register_buffer(short, parameter.detach().clone())
        self.buffer_names[name] = short

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Shadows and the parameters of `model` that they stand for, in the same order."""
        parameters = dict(model.named_parameters())
        shadows = [getattr(self, short) for short in self.buffer_names.values()]
        return shadows, [parameters[name] for name in self.buffer_names]

    def _next_decay(self) -> float:
        if self.num_updates < 0:
            return float(self.decay)
        self.num_updates += 1
        count = int(self.num_updates)
        return min(float(self.decay), (1 + count) / (10 + count))

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Moves every shadow towards its parameter: shadow <- decay * shadow + (1 - decay) * parameter."""
        shadows, parameters = self._pairs(model)
        torch._foreach_lerp_(shadows, parameters, 1 - self._next_decay())

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the parameters of `model` with their averages."""
        shadows, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, shadows)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Remembers the present values of `parameters` until `restore`."""
        self.collected = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Gives `parameters`, the same ones in the same order, the values that `store` remembered.

        Raises:
            ValueError: nothing was stored, or another number of parameters.
        """
        for parameter, value in zip(parameters, self.collected, strict=True):
            parameter.copy_(value)
        self.collected = []

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Within this context `model` has the averaged parameters; afterwards its own again, even after an error."""
        self.store(model.parameters())
        self.copy_to(model)
        try:
            yield
        finally:
            self.restore(model.parameters())
