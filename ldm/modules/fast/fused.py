"""Replace norms, SiLUs, GEGLUs and sums of a frozen U-Net by fused kernels (`ldm.modules.fast.kernels`).

On a fast GPU, a large part of the time of Stable Diffusion's U-Net is memory traffic between convolutions and matrix
products. The fused layers read and write feature maps as few times as possible. Parameters keep their names.
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
    """Group norm of feature maps (B, C, H, W). Gradients reach the maps only."""

    def forward(self, x: Tensor) -> Tensor:
        return _group_norm(self, x, silu=False)[1]


class FusedSpatialTransformer(SpatialTransformer):
    """A spatial transformer with a fused group norm."""

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _group_norm(self.norm, x, silu=False)


class FusedGEGLU(GEGLU):
    """GEGLU with one fused kernel after its projection."""

    def forward(self, x: Tensor) -> Tensor:
        from ldm.modules.fast.kernels.geglu import GatedGELU

        return GatedGELU.apply(self.proj(x))


class FusedResBlock(ResBlock):
    """A residual block that fuses biases, timestep embedding, norms and SiLUs."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        from ldm.modules.fast.kernels.residual import BiasedSum

        # The first norm, SiLU and convolution. The bias is left to the second norm.
        norm, _, conv = self.in_layers
        x, h = _group_norm(norm, x, silu=True)
        h = _conv_without_bias(conv, h)

        # The second norm also adds the first convolution's bias and the timestep embedding.
        norm, _, dropout, out_conv = self.out_layers
        _, h = _group_norm(norm, h, silu=True, added=self.emb_layers(emb).to(h.dtype) + conv.bias)

        # The last sum adds the biases of the second convolution and of the skip connection.
        bias = out_conv.bias
        if isinstance(self.skip_connection, nn.Conv2d):
            x, bias = _conv_without_bias(self.skip_connection, x), bias + self.skip_connection.bias
        return BiasedSum.apply(x, _conv_without_bias(out_conv, dropout(h)), bias)


class FusedTransformerBlock(BasicTransformerBlock):
    """A transformer block that fuses each sum with the layer norm after it."""

    @staticmethod
    def _sum_normalized(norm: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        from ldm.modules.fast.kernels.layer_norm import SumLayerNorm

        return SumLayerNorm.apply(x, added, norm.weight, norm.bias, norm.eps)


def _conv_without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution without its bias, which torch would add by a kernel of its own."""
    return nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x and its group norm; see `GroupNormSiLU`."""
    from ldm.modules.fast.kernels.group_norm import GroupNormSiLU

    return GroupNormSiLU.apply(x, added, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


FUSED = {GEGLU: FusedGEGLU, BasicTransformerBlock: FusedTransformerBlock, SpatialTransformer: FusedSpatialTransformer}


def fuse(network: nn.Module) -> None:
    """Replace the layers of a frozen network by fused ones, in place. Parameters and their names stay."""
    for module in network.modules():
        if type(module) is ResBlock and _can_fuse_block(module):
            module.__class__ = FusedResBlock
        elif type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif isinstance(module, UNetModel) and isinstance(module.out[-1], nn.Conv2d):
            module.out[0].__class__ = FusedGroupNorm


def _can_fuse_block(block: ResBlock) -> bool:
    """Return whether a block is two-dimensional and has nothing between its norms, SiLUs and convolutions."""
    two_dimensions = isinstance(block.in_layers[-1], nn.Conv2d)
    return two_dimensions and not block.updown and not block.use_scale_shift_norm


@functools.cache
def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run on a device, forward and backward; log a warning if they fail on CUDA.

    They need Triton, a C compiler and a GPU that Triton supports. The test compiles the kernels of a small network,
    which are nearly all that a larger one needs.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        _run_kernels(device, dtype)
    except Exception as error:  # noqa: BLE001 - each missing part raises another exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("the U-Net's norms are not fused, which would be faster: %s", reason)
        return False
    return True


def _run_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Run every kernel once, forward and backward."""
    width, side = 2 * NORM_GROUPS, 8
    blocks = nn.ModuleList([ResBlock(width, width, 0.0), SpatialTransformer(width, 1, width)])
    blocks.to(device, dtype).requires_grad_(False)
    fuse(blocks)
    x = torch.zeros(1, width, side, side, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        blocks[1](blocks[0](x, x[:, :, 0, 0])).sum().backward()
