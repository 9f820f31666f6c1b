"""CUDA graphs as far as they can be had without CUDA: everything is computed where it was the first time.

Outputs and gradients lie in the same places in memory for every step, which is what callers have to beware of.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def make_graphed_callables(function: Callable[..., Tensor], samples: Sequence[Tensor], **_: Any
                           ) -> Callable[..., Tensor]:
    """In place of `torch.cuda.make_graphed_callables`, of one function."""
    places = [sample.detach().clone().requires_grad_(sample.requires_grad) for sample in samples]
    output = function(*places).detach()
    gradients = [torch.zeros_like(place) if place.requires_grad else None for place in places]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *tensors: Tensor) -> Tensor:
            with torch.no_grad():
                for place, tensor in zip(places, tensors, strict=True):
                    assert place.shape == tensor.shape and place.dtype == tensor.dtype
                    place.copy_(tensor)
                output.copy_(function(*places))
            return output.detach()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            wanted = [place for place in places if place.requires_grad]
            with torch.enable_grad():
                found = torch.autograd.grad(function(*places), wanted, gradient, allow_unused=True)
            new = iter(found)
            for place in gradients:
                if place is not None and (value := next(new)) is not None:
                    place.copy_(value)
            return tuple(place if place is None else place.detach() for place in gradients)

    return Graphed.apply


class Graph:
    """In place of `torch.cuda.CUDAGraph`: what `captured_into` was told is computed again into the same output."""

    def __init__(self) -> None:
        self.work: Callable[[], Tensor] | None = None
        self.output: Tensor | None = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.work())


@contextmanager
def recording(graph: Graph, network: Any) -> Iterator[None]:
    """In place of `torch.cuda.graph`: the call of `network` within it is what the graph replays, into one place."""
    plain = network.forward

    def recorded(*inputs: Any, **keywords: Any) -> Tensor:
        graph.work = lambda: plain(*inputs, **keywords)
        graph.output = torch.full_like(plain(*inputs, **keywords), torch.nan)  # capturing computes nothing
        return graph.output

    network.forward = recorded
    yield
    network.forward = plain
