"""An exponential moving average (EMA) of a model's trained parameters."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Keep an average of every parameter of a model that requires a gradient.

    The averages are buffers. As in the public checkpoints, a buffer has the name of its parameter without the dots, and
    `decay` and `num_updates` are saved with them.

    Call the module with the model once per optimizer step. (With gradient accumulation, not once per batch.)

    Args:
        model: the model to average.
        decay: weight of the past in each update, 0 to 1.
        use_num_upates: start with a smaller decay, (1 + n) / (10 + n) at update n, so that the average forgets the
            random initialization soon. (The misspelling is the public code's; configs use it.)

    Attributes:
        m_name2s_name: name of a parameter -> name of its average.
        collected_params: what `store` has stored.

    Raises:
        ValueError: if `decay` is out of range, no parameter requires a gradient, or the names of two parameters are
            equal without their dots.

    Example::

        ema = LitEma(model)
        ...
        optimizer.step()
        ema(model)
        with ema.averaged(model):
            validate(model)
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay {decay} is not between 0 and 1")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        self.m_name2s_name: dict[str, str] = {}
        self.collected_params: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._add(name, parameter)
        if not self.m_name2s_name:
            raise ValueError("EMA: no parameter of the model requires a gradient, so there is nothing to average")

    def _add(self, name: str, parameter: Tensor) -> None:
        short = name.replace(".", "")
        if short in self.m_name2s_name.values():
            raise ValueError(f"EMA: parameter {name} and another one have the same name without dots, {short}")
        self.register_buffer(short, parameter.detach().clone())
        self.m_name2s_name[name] = short

    def reset_num_updates(self) -> None:
        """Count updates from 0 again, so that the next averages forget soon."""
        self.num_updates.zero_()

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the parameters of `model` that they belong to, in the same order."""
        parameters = dict(model.named_parameters())
        averages = [getattr(self, short) for short in self.m_name2s_name.values()]
        return averages, [parameters[name] for name in self.m_name2s_name]

    def _next_decay(self) -> float:
        """Count an update and return its decay."""
        if self.num_updates < 0:
            return float(self.decay)
        self.num_updates += 1
        count = int(self.num_updates)
        return min(float(self.decay), (1 + count) / (10 + count))

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update every average: average <- decay * average + (1 - decay) * parameter."""
        averages, parameters = self._pairs(model)
        torch._foreach_lerp_(averages, parameters, 1 - self._next_decay())

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` by their averages."""
        averages, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, averages)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Store the current values of `parameters` until `restore` is called."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write the stored values back to `parameters`, which must be the same ones in the same order.

        Raises:
            ValueError: if nothing is stored, or the number of parameters differs.
        """
        for parameter, value in zip(parameters, self.collected_params, strict=True):
            parameter.copy_(value)
        self.collected_params = []

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averages within this context, and its own parameters afterwards, even after an error."""
        self.store(model.parameters())
        self.copy_to(model)
        try:
            yield
        finally:
            self.restore(model.parameters())
