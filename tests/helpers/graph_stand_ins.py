"""Stand-ins for CUDA graphs that run on the CPU.

Like CUDA graphs, they write outputs and gradients to the same memory in every step, which callers must account for.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def make_graphed_callables(function: Callable[..., Tensor], samples: Sequence[Tensor], **_: Any
                           ) -> Callable[..., Tensor]:
    """Replaces `torch.cuda.make_graphed_callables` for one function."""
    buffers = [sample.detach().clone().requires_grad_(sample.requires_grad) for sample in samples]
    output = function(*buffers).detach()
    gradients = [torch.zeros_like(buffer) if buffer.requires_grad else None for buffer in buffers]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *tensors: Tensor) -> Tensor:
            with torch.no_grad():
                for buffer, tensor in zip(buffers, tensors, strict=True):
                    assert buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
                    buffer.copy_(tensor)
                output.copy_(function(*buffers))
            return output.detach()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            trainable = [buffer for buffer in buffers if buffer.requires_grad]
            with torch.enable_grad():
                computed = iter(torch.autograd.grad(function(*buffers), trainable, gradient, allow_unused=True))
            for buffer in gradients:
                if buffer is not None and (value := next(computed)) is not None:
                    buffer.copy_(value)
            return tuple(buffer if buffer is None else buffer.detach() for buffer in gradients)

    return Graphed.apply


class Graph:
    """Replaces `torch.cuda.CUDAGraph`: a replay computes the recorded call again, into the same output."""

    def __init__(self) -> None:
        self.work: Callable[[], Tensor] | None = None
        self.output: Tensor | None = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.work())


@contextmanager
def recording(graph: Graph, network: Any) -> Iterator[None]:
    """Replaces `torch.cuda.graph`: the graph replays the call of `network` that is made within the context."""
    plain = network.forward

    def recorded(*inputs: Any, **keywords: Any) -> Tensor:
        graph.work = lambda: plain(*inputs, **keywords)
        graph.output = torch.full_like(plain(*inputs, **keywords), torch.nan)  # recording computes nothing
        return graph.output

    network.forward = recorded
    yield
    network.forward = plain
