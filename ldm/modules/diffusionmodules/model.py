"""Encoder and decoder of the first-stage autoencoders, with CompVis latent-diffusion's parameter names.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022), appendix G. The architecture
is that of Esser et al., "Taming Transformers" (CVPR 2021).

Two options are additions for small autoencoders. `patch_size` folds blocks of pixels into channels before the first and
after the last convolution, so that the network computes on a coarse grid. `linear_skip` adds a linear code to the
network's output, so that the network only has to learn what a linear code misses.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.image_attention import LinearAttention, Normalize, SpatialSelfAttention

__all__ = [
    "AttnBlock", "Decoder", "Downsample", "Encoder", "LinAttnBlock", "Normalize", "ResnetBlock", "Upsample",
    "make_attn", "nonlinearity",
]


AttnBlock = SpatialSelfAttention  # the name of the first stages' attention


def nonlinearity(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), the SiLU."""
    return F.silu(x)


def _conv3(inner: int, outer: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel_size=3, padding=1)


class Upsample(nn.Module):
    """Double height and width by nearest-neighbor interpolation, then apply a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        self.conv = _conv3(in_channels, in_channels) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution padded on the right and bottom only, or by a 2x2 mean."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Compute x + conv(silu(norm(conv(silu(norm(x)))))).

    If the widths differ, x goes through a 1x1 convolution, or a 3x3 one if `conv_shortcut`.

    Args:
        temb_channels: width of a timestep embedding that is projected and added after the first convolution. First
            stages have none, 0.
    """

    def __init__(self, *, in_channels: int, out_channels: int | None = None, conv_shortcut: bool = False,
                 dropout: float = 0.0, temb_channels: int = 512) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1, self.conv1 = Normalize(in_channels), _conv3(in_channels, out_channels)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2, self.conv2 = Normalize(out_channels), _conv3(out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        if in_channels != out_channels and conv_shortcut:
            self.conv_shortcut = _conv3(in_channels, out_channels)
        elif in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map x (B, in_channels, H, W), with an embedding (B, temb_channels) if any, to (B, out_channels, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            hidden = hidden + self.temb_proj(F.silu(temb))[..., None, None]
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        shortcut = getattr(self, "nin_shortcut", None) or getattr(self, "conv_shortcut", None)
        return hidden + (x if shortcut is None else shortcut(x))


class LinAttnBlock(LinearAttention):
    """Linear attention with one head as wide as the feature map."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, heads=1, dim_head=in_channels)


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """Build the attention block that a config's `attn_type` names.

    Raises:
        UserError: if `attn_type` is none of "vanilla", "vanilla-xformers" (the same), "linear" and "none".
    """
    if attn_type in ("vanilla", "vanilla-xformers"):
        return AttnBlock(in_channels)
    if attn_type == "linear":
        return LinAttnBlock(in_channels)
    if attn_type == "none":
        return nn.Identity()
    raise UserError(f"attn_type {attn_type!r} is unknown; choose vanilla, linear or none")


def _build_middle(channels: int, dropout: float, attn_type: str) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, temb_channels=0)
    middle.attn_1 = make_attn(channels, attn_type)
    middle.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, temb_channels=0)
    return middle


def _apply_middle(middle: nn.Module, x: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(x)))


def _build_level(channels: Sequence[tuple[int, int]], attend: bool, dropout: float, attn_type: str) -> nn.Module:
    """Build one resolution: a residual block for each (in, out) pair, each followed by attention if `attend`."""
    level = nn.Module()
    level.block = nn.ModuleList(
        ResnetBlock(in_channels=inner, out_channels=outer, dropout=dropout, temb_channels=0)
        for inner, outer in channels)
    level.attn = nn.ModuleList(make_attn(outer, attn_type) for _, outer in channels if attend)
    return level


def _apply_level(level: nn.Module, x: Tensor) -> Tensor:
    for index, block in enumerate(level.block):
        x = block(x)
        if len(level.attn):
            x = level.attn[index](x)
    return x


class Encoder(nn.Module):
    """Encode images (B, in_channels, H, W) to features (B, Z, H/f, W/f) with f = patch_size * 2^(levels - 1).

    Args:
        ch: width of the first convolution.
        ch_mult: width of each level, in multiples of `ch`.
        num_res_blocks: number of residual blocks per level.
        attn_resolutions: sides of the feature maps that get self-attention, for inputs of side `resolution`.
        dropout: dropout rate.
        resamp_with_conv: whether to change resolution by convolutions.
        in_channels: channels of the images.
        resolution: side of the images; other sizes work, too.
        z_channels: channels of the latent.
        double_z: whether Z is twice `z_channels`, for a mean and a log-variance.
        use_linear_attn: as `attn_type` "linear".
        attn_type: see `make_attn`.
        patch_size: side of the pixel blocks that are folded into channels.
        linear_skip: whether to add a linear map of each block of f x f pixels to the features.
        out_ch, others: ignored; configs share their settings with the decoder.
    """

    def __init__(self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int,
                 attn_resolutions: Sequence[int], dropout: float = 0.0, resamp_with_conv: bool = True,
                 in_channels: int, resolution: int, z_channels: int, double_z: bool = True,
                 use_linear_attn: bool = False, attn_type: str = "vanilla", patch_size: int = 1,
                 linear_skip: bool = False, **others: Any) -> None:
        super().__init__()
        self.ch, self.temb_ch, self.num_resolutions, self.num_res_blocks = ch, 0, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        self.patch_size = patch_size
        attn_type = "linear" if use_linear_attn else attn_type
        self.conv_in = _conv3(in_channels * patch_size**2, ch)
        widths = [ch, *(ch * factor for factor in ch_mult)]
        side = resolution // patch_size
        self.down = nn.ModuleList()
        for index, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
            pairs = [(inner, outer)] + [(outer, outer)] * (num_res_blocks - 1)
            level = _build_level(pairs, side in attn_resolutions, dropout, attn_type)
            if index < len(ch_mult) - 1:
                level.downsample = Downsample(outer, resamp_with_conv)
                side //= 2
            self.down.append(level)
        self.mid = _build_middle(widths[-1], dropout, attn_type)
        self.norm_out = Normalize(widths[-1])
        self.conv_out = _conv3(widths[-1], 2 * z_channels if double_z else z_channels)
        self.factor = patch_size * 2 ** (len(ch_mult) - 1)
        self.skip = nn.Conv2d(in_channels * self.factor**2, self.conv_out.out_channels, 1) if linear_skip else None

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, in_channels, H, W)."""
        pixels = x
        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        for level in self.down:
            x = _apply_level(level, x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        x = self.conv_out(F.silu(self.norm_out(_apply_middle(self.mid, x))))
        return x if self.skip is None else x + self.skip(F.pixel_unshuffle(pixels, self.factor))


class Decoder(nn.Module):
    """Decode latents (B, z_channels, h, w) to images (B, out_ch, f h, f w).

    Args (in addition to those of `Encoder`):
        out_ch: channels of the images.
        give_pre_end: whether to skip the last normalization, the last convolution and the linear skip.
        tanh_out: whether to squash the result to (-1, 1).
    """

    def __init__(self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int,
                 attn_resolutions: Sequence[int], dropout: float = 0.0, resamp_with_conv: bool = True,
                 in_channels: int, resolution: int, z_channels: int, double_z: bool = True,
                 give_pre_end: bool = False, tanh_out: bool = False, use_linear_attn: bool = False,
                 attn_type: str = "vanilla", patch_size: int = 1, linear_skip: bool = False, **others: Any) -> None:
        super().__init__()
        self.ch, self.temb_ch, self.num_resolutions, self.num_res_blocks = ch, 0, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels = resolution, in_channels
        self.patch_size, self.give_pre_end, self.tanh_out = patch_size, give_pre_end, tanh_out
        attn_type = "linear" if use_linear_attn else attn_type
        widths = [ch * factor for factor in ch_mult]
        side = resolution // patch_size // 2 ** (len(widths) - 1)
        self.z_shape = (1, z_channels, side, side)
        self.conv_in = _conv3(z_channels, widths[-1])
        self.mid = _build_middle(widths[-1], dropout, attn_type)
        levels, inner = [], widths[-1]
        for index in reversed(range(len(widths))):
            pairs = [(inner, widths[index])] + [(widths[index], widths[index])] * num_res_blocks
            level = _build_level(pairs, side in attn_resolutions, dropout, attn_type)
            if index > 0:
                level.upsample = Upsample(widths[index], resamp_with_conv)
                side *= 2
            levels.append(level)
            inner = widths[index]
        self.up = nn.ModuleList(reversed(levels))  # the finest level has index 0, as in the encoder
        self.norm_out = Normalize(inner)
        self.conv_out = _conv3(inner, out_ch * patch_size**2)
        self.factor = patch_size * 2 ** (len(widths) - 1)
        self.skip = _conv3(z_channels, out_ch * self.factor**2) if linear_skip else None

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer, whose gradients determine the weight of the adversarial loss."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents (B, z_channels, h, w)."""
        x = _apply_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            x = _apply_level(level, x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        if self.give_pre_end:
            return x
        x = self.conv_out(F.silu(self.norm_out(x)))
        x = F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x
        x = x if self.skip is None else x + F.pixel_shuffle(self.skip(z), self.factor)
        return torch.tanh(x) if self.tanh_out else x
