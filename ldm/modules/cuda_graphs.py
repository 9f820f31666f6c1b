"""A U-Net's passes as CUDA graphs: all their kernels are launched at once, where Python would launch them one by one.

Each of Stable Diffusion's passes is thousands of kernels. Up to a batch of about 8 a fast GPU is done with one before
Python can give it the next. What is captured once is replayed with new numbers in the same places in memory, so every
shape of inputs has a graph of its own (Nvidia, "CUDA C++ Programming Guide", CUDA Graphs; `torch.cuda.graph`).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ldm.modules.context import PromptContext

Context = Tensor | PromptContext
MOST_SHAPES = 4  # that are trained on: each keeps memory for all activations of its own


class GraphedUNet:
    """Calls a frozen U-Net by its graphs where it can, and as it is where not.

    Args:
        unet: on a CUDA device, without dropout. Its weights must stay where they are.
    """

    def __init__(self, unet: nn.Module) -> None:
        if has_dropout(unet):
            raise ValueError("a graph would repeat the same dropout in every step")
        self.unet = unet
        self.training: dict[object, Callable[..., Tensor]] = {}
        self.sampling: SamplingSteps | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """What the U-Net makes of x (B, C, H, W) at timesteps (B,) under a context of B prompts."""
        if torch.is_grad_enabled():
            return self._with_gradient(x, timesteps, context)
        if not (isinstance(context, PromptContext) and context.cache):
            return self.unet(x, timesteps, context=context)  # nobody says that it will come again
        if self.sampling is None or not self.sampling.fits(x, timesteps, context):
            self.sampling = None  # before the next one, to have its memory back
            self.sampling = SamplingSteps(self.unet, x, timesteps, context)
        return self.sampling(x, timesteps)

    def _with_gradient(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        tensors, rebuilt = unpacked(context)
        inputs = (x, timesteps, *tensors)
        shape = (rebuilt, *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs))
        if shape not in self.training:
            if len(self.training) == MOST_SHAPES:
                return self.unet(x, timesteps, context=context)
            self.training[shape] = captured(lambda x, t, *rest: self.unet(x, t, context=rebuilt(rest)), inputs)
        return self.training[shape](*inputs)


def has_dropout(unet: nn.Module) -> bool:
    """Whether a pass through it may differ from the next by what it leaves out."""
    return any(isinstance(module, nn.Dropout) and module.p for module in unet.modules())


class SamplingSteps:
    """The steps of one sampling: the first by the U-Net itself, which keeps keys and values, then all by one graph.

    Args:
        unet, x, timesteps, context: what the first step is of.
    """

    def __init__(self, unet: nn.Module, x: Tensor, timesteps: Tensor, context: PromptContext) -> None:
        self.unet, self.context = unet, context
        self.inputs = x.clone(), timesteps.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None
        self.begun = False

    def fits(self, x: Tensor, timesteps: Tensor, context: PromptContext) -> bool:
        """Whether a step is one of this sampling."""
        return context is self.context and all(
            new.shape == old.shape and new.dtype == old.dtype
            for new, old in zip((x, timesteps), self.inputs, strict=True))

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        if not self.begun:
            self.begun = True
            return self.unet(x, timesteps, context=self.context)
        for place, new in zip(self.inputs, (x, timesteps), strict=True):
            place.copy_(new)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.unet(*self.inputs, context=self.context)
        self.graph.replay()
        return self.output.clone()  # the next step writes into the same place


class Rebuilt:
    """Makes a context of the tensors that `unpacked` took out of one; those that are built alike compare equal."""

    def __init__(self, structure: object) -> None:
        self.structure = structure

    def __call__(self, tensors: Sequence[Tensor]) -> Context:
        if self.structure is None:
            return tensors[0]
        return PromptContext(**tree_unflatten(list(tensors), self.structure))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rebuilt) and self.structure == other.structure

    def __hash__(self) -> int:
        return hash(str(self.structure))


def unpacked(context: Context) -> tuple[list[Tensor], Rebuilt]:
    """The tensors of a context, and what makes one like it of as many others."""
    if isinstance(context, Tensor):
        return [context], Rebuilt(None)
    values = {field.name: getattr(context, field.name) for field in fields(context) if field.init}
    tensors, structure = tree_flatten({name: dict(value) if name.startswith("target_outputs") else value
                                       for name, value in values.items()
                                       if name not in ("weights", "cache") and value is not None})
    return tensors, Rebuilt(structure)


def captured(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """`function`, forward and backward as graphs, for inputs of these shapes that want gradients where these do.

    A graph writes outputs and gradients to the same places in every step. What is handed out are copies.
    """
    samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs)
    with torch.autocast("cuda", enabled=False):  # it would keep casts that a graph throws away
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
