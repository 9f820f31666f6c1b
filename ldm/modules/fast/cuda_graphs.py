"""Run frozen networks by CUDA graphs, which launch all kernels at once instead of one by one from Python.

A pass through Stable Diffusion's U-Net launches thousands of kernels. Up to a batch of about 8, a fast GPU finishes a
kernel before Python launches the next one. A graph is captured once and then replayed with new values in the same
memory, so every shape of inputs needs a graph of its own.

Source: Nvidia, "CUDA C++ Programming Guide", CUDA Graphs; `torch.cuda.graph`, `torch.cuda.make_graphed_callables`.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.context import PER_LAYER, PromptContext

Context = Tensor | PromptContext
MAX_TRAINING_GRAPHS = 4  # each graph keeps memory for all activations
PROMPT_MULTIPLE = 4  # more than two prompts are padded to a multiple of this, so that few shapes occur


class GraphedUNet:
    """Call a frozen U-Net by CUDA graphs, and directly where no graph applies.

    Args:
        unet: the U-Net, on a CUDA device and without dropout. Its weights must stay where they are in memory.

    Raises:
        ValueError: if the U-Net has dropout.
    """

    def __init__(self, unet: nn.Module) -> None:
        if has_dropout(unet):
            raise ValueError("a CUDA graph would repeat the same dropout mask in every step")
        self.unet = unet
        self.training_graphs = TrainingGraphs()
        self.sampling_graph: SamplingGraph | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """Compute the U-Net's output for x (B, C, H, W), timesteps (B,) and a context of B prompts."""
        if torch.is_grad_enabled():
            return self._call_with_gradient(x, timesteps, context)
        if not (isinstance(context, PromptContext) and context.cache):
            return _call(self.unet, x, timesteps, context)  # the prompts may not come again
        if self.sampling_graph is None or not self.sampling_graph.fits(x, timesteps, context):
            self.sampling_graph = None  # frees its memory before the next one takes some
            self.sampling_graph = SamplingGraph(self.unet, x, timesteps)
        return self.sampling_graph(x, timesteps, context)

    def _call_with_gradient(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        tensors, layout = flatten_context(context)

        def call_unet(x: Tensor, timesteps: Tensor, *tensors: Tensor) -> Tensor:
            return _call(self.unet, x, timesteps, layout.rebuild(tensors))

        return self.training_graphs(call_unet, (x, timesteps, *tensors), layout)


class TrainingGraphs:
    """Call a function of tensors by CUDA graphs, forward and backward, with one graph for each shape of inputs."""

    def __init__(self) -> None:
        self.graphs: dict[object, Callable[..., Tensor]] = {}

    def __call__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], layout: object = None) -> Tensor:
        """Compute `function(*inputs)`; it must be the same function as in earlier calls with this `layout`."""
        shapes = (layout, *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs))
        if shapes not in self.graphs:
            if len(self.graphs) == MAX_TRAINING_GRAPHS:
                return function(*inputs)
            self.graphs[shapes] = capture_with_gradient(function, inputs)
        return self.graphs[shapes](*inputs)


class GraphedEncoder:
    """Call a frozen text encoder by CUDA graphs if gradients are needed.

    The number of distinct prompts varies from batch to batch. The batch is padded, so that few numbers occur.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode, self.training_graphs = encode, TrainingGraphs()

    def __call__(self, embedded: Tensor) -> Tensor:
        """Compute `encode` of embedded prompts (B, N, width)."""
        if not embedded.requires_grad:
            return self.encode(embedded)
        count = len(embedded)
        padding = (-count) % (PROMPT_MULTIPLE if count > 2 else 1)
        padded = torch.cat([embedded, embedded[:1].detach().expand(padding, -1, -1)])
        return self.training_graphs(self.encode, (padded,))[:count]


def vector_kwargs(context: Any) -> dict[str, Tensor]:
    """Return the U-Net's keyword for the vector of a context, or nothing if it has none."""
    vector = getattr(context, "vector", None)
    return {} if vector is None else {"y": vector}


def _call(unet: nn.Module, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
    return unet(x, timesteps, context=context, **vector_kwargs(context))


def has_dropout(network: nn.Module) -> bool:
    """Return whether a network has dropout with a rate above 0."""
    return any(isinstance(module, nn.Dropout) and module.p for module in network.modules())


class SamplingGraph:
    """The sampling steps of one shape, replayed by a single graph.

    The U-Net itself runs the first step of each sampling, which computes the keys and values of the prompts. They are
    copied into the graph's memory, and the graph runs all further steps.

    Args:
        unet: the U-Net.
        x, timesteps: inputs of the first step.
    """

    def __init__(self, unet: nn.Module, x: Tensor, timesteps: Tensor) -> None:
        self.unet, self.inputs = unet, (x.clone(), timesteps.clone())
        self.current_context: PromptContext | None = None  # the prompts of the sampling in progress
        self.captured_context: PromptContext | None = None  # the graph's own copy of prompts, keys and values
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None

    def fits(self, x: Tensor, timesteps: Tensor, context: PromptContext) -> bool:
        """Return whether the graph can run a step with these inputs."""
        same_shapes = all(new.shape == old.shape and new.dtype == old.dtype
                          for new, old in zip((x, timesteps), self.inputs, strict=True))
        if self.captured_context is None:
            return same_shapes
        same_vector = vector_kwargs(context).keys() == vector_kwargs(self.captured_context).keys()
        return same_shapes and same_vector and context.shape == self.captured_context.shape

    def __call__(self, x: Tensor, timesteps: Tensor, context: PromptContext) -> Tensor:
        # The first step of a sampling: compute keys and values, and give them to the graph if there is one.
        if context is not self.current_context:
            output = _call(self.unet, x, timesteps, context)
            self.current_context = context
            if self.captured_context is not None:
                self.captured_context.copy_cached_from(context)
            return output

        # Further steps: replay the graph.
        for static_input, new in zip(self.inputs, (x, timesteps), strict=True):
            static_input.copy_(new)
        if self.graph is None:
            self._capture(context)
        self.graph.replay()
        return self.output.clone()  # the next step overwrites the graph's output

    def _capture(self, context: PromptContext) -> None:
        """Capture the graph. If that fails for lack of memory, nothing changes, and a later sampling tries again."""
        captured_context, graph = context.clone_cached(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = _call(self.unet, *self.inputs, captured_context)
        self.captured_context, self.graph, self.output = captured_context, graph, output


@dataclass(frozen=True)
class ContextLayout:
    """How to rebuild a context from the tensors of `flatten_context`. Contexts with equal layouts share a graph.

    Attributes:
        names: the attributes of a `PromptContext` that the tensors are; empty: the only tensor is the context.
        layers: table of target outputs -> (name, width) of its layers, in the order of its columns.
    """

    names: tuple[str, ...] = ()
    layers: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict, hash=False)

    def rebuild(self, tensors: Sequence[Tensor]) -> Context:
        """Return a context of these tensors."""
        if not self.names:
            return tensors[0]
        values: dict[str, Any] = {**dict.fromkeys(PER_LAYER, {}), **dict(zip(self.names, tensors, strict=True))}
        for table, layers in self.layers.items():
            columns = values[table].split([width for _, width in layers], dim=1)
            values[table] = dict(zip((name for name, _ in layers), columns, strict=True))
        return PromptContext(**values)


def flatten_context(context: Context) -> tuple[list[Tensor], ContextLayout]:
    """Take a context apart into few tensors, because every input of a graph is copied on its own.

    The target outputs of all layers are joined into one tensor.

    Returns:
        The tensors, and the layout that rebuilds a context from tensors like them.
    """
    if isinstance(context, Tensor):
        return [context], ContextLayout()
    per_prompt = context.per_prompt_tensors()
    tables = {name: table for name in PER_LAYER if (table := getattr(context, name))}
    joined = {name: torch.cat(list(table.values()), dim=1) for name, table in tables.items()}
    layers = {name: tuple((layer, outputs.shape[1]) for layer, outputs in table.items())
              for name, table in tables.items()}
    return [*per_prompt.values(), *joined.values()], ContextLayout((*per_prompt, *joined), layers)


def capture_with_gradient(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Capture the forward and backward passes of a function as CUDA graphs.

    A graph writes outputs and gradients to the same memory in every step. Callers get copies.

    Args:
        function: the function.
        inputs: inputs with the shapes to capture; gradients are computed for those that require them.
    """
    samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)
    with torch.autocast("cuda", enabled=False), warnings.catch_warnings():  # autocast caches casts that a graph frees
        # The warning is about the samples, whose gradients are not used.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
        graphed = torch.cuda.make_graphed_callables(function, samples, allow_unused_input=True)
    return lambda *tensors: graphed(*map(CopyGradient.apply, tensors)).clone()


class CopyGradient(torch.autograd.Function):
    """The identity, with a copy of the gradient.

    A parameter that accumulates gradients may keep the tensor it gets, which must not be the graph's memory.
    """

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient.clone()
