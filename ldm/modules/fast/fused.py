"""A frozen U-Net whose norms, SiLUs, GEGLUs and sums are computed by kernels of its own (`ldm.modules.fast.kernels`).

A good part of the time that Stable Diffusion's U-Net takes on a fast GPU goes into passing over what convolutions and
matrix products give. What follows them is done in as few passes as there can be. Parameters keep their names.
"""
from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor, nn

from ldm.modules.attention import GEGLU, BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.diffusionmodules.util import NORM_GROUPS

log = logging.getLogger(__name__)


class FusedGroupNorm(nn.GroupNorm):
    """The group norm of maps (B, C, H, W); a gradient for the maps alone."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalized(self, x, silu=False)[1]


class FusedSpatialTransformer(SpatialTransformer):
    """Transformer blocks over a map whose norm has few passes."""

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _normalized(self.norm, x, silu=False)


class FusedGEGLU(GEGLU):
    """GEGLU with one pass behind its projection."""

    def forward(self, x: Tensor) -> Tensor:
        from ldm.modules.fast.kernels.geglu import GatedGELU

        return GatedGELU.apply(self.proj(x))


class FusedResBlock(ResBlock):
    """A residual block whose biases, embedding, norms and SiLUs have no passes of their own."""

    def _residual(self, x: Tensor, emb: Tensor) -> Tensor:
        from ldm.modules.fast.kernels.residual import BiasedSum

        norm, _, conv = self.in_layers
        x, h = _normalized(norm, x, silu=True)
        h = _convolved(h, conv)
        norm, _, dropout, out = self.out_layers
        _, h = _normalized(norm, h, silu=True, added=self.emb_layers(emb).to(h.dtype) + conv.bias)
        if isinstance(self.skip_connection, nn.Conv2d):
            x, bias = _convolved(x, self.skip_connection), out.bias + self.skip_connection.bias
        else:
            bias = out.bias
        return BiasedSum.apply(x, _convolved(dropout(h), out), bias)


class FusedTransformerBlock(BasicTransformerBlock):
    """A transformer block that adds up and normalizes in one pass."""

    @staticmethod
    def _sum_normalized(norm: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        from ldm.modules.fast.kernels.layer_norm import SumLayerNorm

        return SumLayerNorm.apply(x, added, norm.weight, norm.bias, norm.eps)


def _convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution without its bias, which torch would add in a pass of its own."""
    return nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _normalized(norm: nn.GroupNorm, x: Tensor, silu: bool, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from ldm.modules.fast.kernels.group_norm import GroupNormSiLU

    return GroupNormSiLU.apply(x, added, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


FUSED = {GEGLU: FusedGEGLU, BasicTransformerBlock: FusedTransformerBlock, SpatialTransformer: FusedSpatialTransformer}


def fuse(network: nn.Module) -> None:
    """Turns the layers of a network, none of whose weights is trained, into such ones; its parameters stay."""
    for module in network.modules():
        if type(module) is ResBlock and _is_plain(module):
            module.__class__ = FusedResBlock
        elif type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif isinstance(module, UNetModel) and isinstance(module.out[-1], nn.Conv2d):
            module.out[0].__class__ = FusedGroupNorm


def _is_plain(block: ResBlock) -> bool:
    """Whether it is of two dimensions, and nothing comes between its norms, SiLUs and convolutions."""
    two_dimensions = isinstance(block.in_layers[-1], nn.Conv2d)
    return two_dimensions and block.resample is None and not block.use_scale_shift_norm


@functools.cache
def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there, forward and backward, which takes Triton, a C compiler and no old GPU.

    They are compiled when they are first called; those of a small network are nearly all that larger ones need.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        _try_out(device, dtype)
    except Exception as error:  # noqa: BLE001 - whatever is missing says so in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("the U-Net's norms are not fused, which would be faster: %s", reason)
        return False
    return True


def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Calls every kernel."""
    width, side = 2 * NORM_GROUPS, 8
    blocks = nn.ModuleList([ResBlock(width, width, 0.0), SpatialTransformer(width, 1, width)])
    blocks.to(device, dtype).requires_grad_(False)
    fuse(blocks)
    x = torch.zeros(1, width, side, side, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        blocks[1](blocks[0](x, x[:, :, 0, 0])).sum().backward()
