"""Passes of frozen networks as CUDA graphs: all kernels are launched at once, where Python would launch them singly.

Each of Stable Diffusion's passes is thousands of kernels. Up to a batch of about 8 a fast GPU is done with one before
Python can give it the next. What is captured once is replayed with new numbers in the same places in memory, so every
shape of inputs has a graph of its own (Nvidia, "CUDA C++ Programming Guide", CUDA Graphs; `torch.cuda.graph`).
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.context import TABLES, PromptContext

Context = Tensor | PromptContext
MOST_SHAPES = 4  # that are trained on: each keeps memory for all activations of its own
PROMPTS = 4  # a multiple of which, of more than two, are encoded at a time


class GraphedUNet:
    """Calls a frozen U-Net by its graphs where it can, and as it is where not.

    Args:
        unet: on a CUDA device, without dropout. Its weights must stay where they are.
    """

    def __init__(self, unet: nn.Module) -> None:
        if has_dropout(unet):
            raise ValueError("a graph would repeat the same dropout in every step")
        self.unet = unet
        self.training = TrainingGraphs()
        self.sampling: SamplingSteps | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """What the U-Net makes of x (B, C, H, W) at timesteps (B,) under a context of B prompts."""
        if torch.is_grad_enabled():
            return self._with_gradient(x, timesteps, context)
        if not (isinstance(context, PromptContext) and context.cache):
            return self.unet(x, timesteps, context=context)  # nobody says that it will come again
        if self.sampling is None or not self.sampling.fits(x, timesteps, context):
            self.sampling = None  # before the next one, to have its memory back
            self.sampling = SamplingSteps(self.unet, x, timesteps)
        return self.sampling(x, timesteps, context)

    def _with_gradient(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        tensors, rebuilt = unpacked(context)
        return self.training(lambda x, t, *rest: self.unet(x, t, context=rebuilt(rest)), (x, timesteps, *tensors),
                             rebuilt)


class TrainingGraphs:
    """Calls a function of tensors, of which some want gradients, by graphs: one for each of the first few shapes."""

    def __init__(self) -> None:
        self.graphs: dict[object, Callable[..., Tensor]] = {}

    def __call__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], kind: object = None) -> Tensor:
        """`function(*inputs)`; the same as in former calls unless `kind` is another."""
        shape = (kind, *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs))
        if shape not in self.graphs:
            if len(self.graphs) == MOST_SHAPES:
                return function(*inputs)
            self.graphs[shape] = captured(function, inputs)
        return self.graphs[shape](*inputs)


class GraphedEncoder:
    """Calls a frozen text encoder by graphs where it is to give gradients.

    A batch has now more, now fewer distinct prompts: they are filled up to a number that comes again.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode, self.training = encode, TrainingGraphs()

    def __call__(self, embedded: Tensor) -> Tensor:
        """What `encode` makes of embedded prompts (B, N, width)."""
        if not embedded.requires_grad:
            return self.encode(embedded)
        count = len(embedded)
        lacking = (-count) % (PROMPTS if count > 2 else 1)
        filled = torch.cat([embedded, embedded[:1].detach().expand(lacking, -1, -1)])
        return self.training(self.encode, (filled,))[:count]


def has_dropout(unet: nn.Module) -> bool:
    """Whether a pass through it may differ from the next by what it leaves out."""
    return any(isinstance(module, nn.Dropout) and module.p for module in unet.modules())


class SamplingSteps:
    """The steps of samplings of one shape: the first of each by the U-Net itself, which keeps keys and values of its
    prompts, then all by one graph, into which those are copied.

    Args:
        unet, x, timesteps: what the first step is of.
    """

    def __init__(self, unet: nn.Module, x: Tensor, timesteps: Tensor) -> None:
        self.unet, self.inputs = unet, (x.clone(), timesteps.clone())
        self.begun: PromptContext | None = None  # the prompts of the sampling that is going on
        self.captured: PromptContext | None = None  # a copy that nobody else reads, with their keys and values
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None

    def fits(self, x: Tensor, timesteps: Tensor, context: PromptContext) -> bool:
        """Whether a step is one of these, or may be the first of another such sampling."""
        same = all(new.shape == old.shape and new.dtype == old.dtype
                   for new, old in zip((x, timesteps), self.inputs, strict=True))
        return same and (self.captured is None or context.shape == self.captured.shape)

    def __call__(self, x: Tensor, timesteps: Tensor, context: PromptContext) -> Tensor:
        if context is not self.begun:
            first = self.unet(x, timesteps, context=context)
            self.begun = context
            if self.captured is not None:
                self.captured.copy_cached_from(context)
            return first
        for place, new in zip(self.inputs, (x, timesteps), strict=True):
            place.copy_(new)
        if self.graph is None:
            self._capture(context)
        self.graph.replay()
        return self.output.clone()  # the next step writes into the same place

    def _capture(self, context: PromptContext) -> None:
        """Keeps nothing unless all goes well: where memory is short, a later sampling tries again."""
        captured, graph = context.clone_cached(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.unet(*self.inputs, context=captured)
        self.captured, self.graph, self.output = captured, graph, output


@dataclass(frozen=True)
class Rebuilt:
    """Makes a context of the tensors that `unpacked` took out of one; those that are built alike are equal.

    Attributes:
        names: what the tensors are of a `PromptContext`; none: the only one is the context.
        layers: of each table of target outputs the names and widths of its layers, in the order of its columns.
    """

    names: tuple[str, ...] = ()
    layers: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict, hash=False)

    def __call__(self, tensors: Sequence[Tensor]) -> Context:
        if not self.names:
            return tensors[0]
        values: dict[str, Any] = {**dict.fromkeys(TABLES, {}), **dict(zip(self.names, tensors, strict=True))}
        for name, layers in self.layers.items():
            columns = values[name].split([width for _, width in layers], dim=1)
            values[name] = dict(zip((layer for layer, _ in layers), columns, strict=True))
        return PromptContext(**values)


def unpacked(context: Context) -> tuple[list[Tensor], Rebuilt]:
    """The tensors of a context, as few as they can be, and what makes one like it of as many others.

    Target outputs of all layers are joined: a graph's inputs are copied one by one.
    """
    if isinstance(context, Tensor):
        return [context], Rebuilt()
    named = context.per_prompt_tensors()
    tables = {name: table for name in TABLES if (table := getattr(context, name))}
    joined = {name: torch.cat(list(table.values()), dim=1) for name, table in tables.items()}
    layers = {name: tuple((layer, outputs.shape[1]) for layer, outputs in table.items())
              for name, table in tables.items()}
    return [*named.values(), *joined.values()], Rebuilt((*named, *joined), layers)


def captured(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """`function`, forward and backward as graphs, for inputs of these shapes that want gradients where these do.

    A graph writes outputs and gradients to the same places in every step. What is handed out are copies.
    """
    samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)
    with torch.autocast("cuda", enabled=False), warnings.catch_warnings():  # autocast keeps casts that a graph drops
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # that of samples, which take no gradient
        graphed = torch.cuda.make_graphed_callables(function, samples, allow_unused_input=True)
    return lambda *tensors: graphed(*map(OwnGradient.apply, tensors)).clone()


class OwnGradient(torch.autograd.Function):
    """The identity, whose gradient is a copy: a parameter that adds up those of several steps may keep what it gets."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient.clone()
