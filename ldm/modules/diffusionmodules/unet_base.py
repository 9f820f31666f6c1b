"""What U-Nets with and without a decoder half share: their settings, and how they are built of blocks."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd, linear


class UNetBase(nn.Module):
    """Settings of a U-Net, see `UNetModel`, and methods that build its parts.

    Raises:
        UserError: if `num_res_blocks` does not have one entry per level.
    """

    use_spatial_transformer = False
    transformer_depth: int | Sequence[int] = 1
    transformer_depth_middle: int | None = None
    legacy = True
    disable_self_attentions: Sequence[bool] | None = None
    num_attention_blocks: Sequence[int] | None = None
    disable_middle_self_attn = False

    def __init__(
        self, *, image_size: int, in_channels: int, model_channels: int, out_channels: int,
        num_res_blocks: int | Sequence[int], attention_resolutions: Iterable[int], dropout: float,
        channel_mult: Sequence[int], conv_resample: bool, dims: int, use_checkpoint: bool, use_fp16: bool,
        use_bf16: bool = False, num_heads: int, num_head_channels: int, num_heads_upsample: int,
        use_scale_shift_norm: bool, resblock_updown: bool, use_new_attention_order: bool,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.dims, self.dropout = model_channels, dims, dropout
        self.channel_mult = tuple(channel_mult)
        self.num_res_blocks = _blocks_per_level(num_res_blocks, len(self.channel_mult))
        self.attention_resolutions = list(attention_resolutions)
        self.conv_resample, self.resblock_updown = conv_resample, resblock_updown
        self.use_checkpoint = use_checkpoint
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm, self.use_new_attention_order = use_scale_shift_norm, use_new_attention_order
        self._dtype = torch.bfloat16 if use_bf16 else torch.float16 if use_fp16 else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that users convert inputs to: that of 16-bit weights, otherwise the one that was set, if any.

        The model itself follows its weights, and autocast.
        """
        return self._weight_dtype if self._dtype is None or self._weight_dtype != torch.float32 else self._dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.input_blocks[0][0].weight.dtype

    def convert_to_fp16(self) -> None:
        """Do nothing, as in latent diffusion: autocast and `ldm.modules.fast` choose the precision."""

    def convert_to_fp32(self) -> None:
        """Do nothing, as in latent diffusion."""

    @property
    def _embedding_channels(self) -> int:
        return 4 * self.model_channels

    def _time_embedding(self) -> nn.Sequential:
        width = self._embedding_channels
        return nn.Sequential(linear(self.model_channels, width), nn.SiLU(), linear(width, width))

    def _build_encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """Return the blocks from high to low resolution, and the channels of their skip connections."""
        channels = self.model_channels
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, channels, 3, padding=1))]
        skips = [channels]
        for level, multiple in enumerate(self.channel_mult):
            width = multiple * self.model_channels
            for index in range(self.num_res_blocks[level]):
                residual = self._residual(channels, width)
                channels = width
                attention = self._attention_at(level, index, channels, self.num_heads)
                blocks.append(TimestepEmbedSequential(residual, *attention))
                skips.append(channels)
            if level + 1 < len(self.channel_mult):
                blocks.append(TimestepEmbedSequential(self._resampling(channels, up=False)))
                skips.append(channels)
        return nn.ModuleList(blocks), skips

    def _build_middle(self, channels: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(
            self._residual(channels, channels),
            self._attention(channels, self.num_heads, self._middle_depth, self.disable_middle_self_attn),
            self._residual(channels, channels),
        )

    def _build_decoder(self, skips: Sequence[int]) -> nn.ModuleList:
        """Return the blocks from low to high resolution; each reads the last skip connection that is left."""
        remaining_skips, channels = list(skips), skips[-1]
        blocks = []
        for level, multiple in reversed(list(enumerate(self.channel_mult))):
            width = multiple * self.model_channels
            for index in range(self.num_res_blocks[level] + 1):
                block: list[nn.Module] = [self._residual(channels + remaining_skips.pop(), width)]
                channels = width
                block += self._attention_at(level, index, channels, self.num_heads_upsample)
                if level and index == self.num_res_blocks[level]:
                    block.append(self._resampling(channels, up=True))
                blocks.append(TimestepEmbedSequential(*block))
        return nn.ModuleList(blocks)

    def _residual(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels, self._embedding_channels, self.dropout, out_channels, dims=self.dims, up=up, down=down,
            use_scale_shift_norm=self.use_scale_shift_norm, use_checkpoint=self.use_checkpoint,
        )

    def _resampling(self, channels: int, up: bool) -> nn.Module:
        if self.resblock_updown:
            return self._residual(channels, channels, up=up, down=not up)
        return (Upsample if up else Downsample)(channels, self.conv_resample, self.dims)

    def _attention_at(self, level: int, index: int, channels: int, heads: int) -> list[nn.Module]:
        """Return the attention after the residual block `index` of a level, or nothing."""
        count = None if self.num_attention_blocks is None else self.num_attention_blocks[level]
        if 2**level not in self.attention_resolutions or (count is not None and index >= count):
            return []
        disabled = self.disable_self_attentions is not None and bool(self.disable_self_attentions[level])
        return [self._attention(channels, heads, self._depth_of(level), disabled)]

    def _depth_of(self, level: int) -> int:
        """Return the number of transformer blocks in each spatial transformer of a level."""
        depth = self.transformer_depth
        return depth if isinstance(depth, int) else depth[level]

    @property
    def _middle_depth(self) -> int:
        given = self.transformer_depth_middle
        return self._depth_of(len(self.channel_mult) - 1) if given is None else given

    def _attention(self, channels: int, block_heads: int, depth: int, disable_self_attn: bool = False) -> nn.Module:
        """Build the attention for `channels`, with `num_heads` heads, or with heads of `num_head_channels` if given.

        There is one exception: an `AttentionBlock` of a legacy model without `num_head_channels` has `block_heads`
        heads. (In the public code `legacy` seems to affect more. But if the channels divide into heads, this is all.)
        """
        by_width = self.num_head_channels != -1
        heads = channels // self.num_head_channels if by_width else self.num_heads
        if heads < 1 or channels % (self.num_head_channels if by_width else heads):
            raise UserError(f"{type(self).__name__}: {channels} channels do not divide into attention heads; "
                            f"change num_heads ({self.num_heads}) or num_head_channels ({self.num_head_channels})")
        if self.use_spatial_transformer:
            return SpatialTransformer(
                channels, heads, channels // heads, depth, context_dim=self.context_dim,
                disable_self_attn=disable_self_attn, use_linear=self.use_linear_in_transformer,
                use_checkpoint=self.use_checkpoint,
            )
        return AttentionBlock(
            channels, block_heads if self.legacy and not by_width else heads, use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )


def _blocks_per_level(num_res_blocks: int | Sequence[int], levels: int) -> list[int]:
    """Return `num_res_blocks` with one entry per level."""
    if isinstance(num_res_blocks, int):
        return [num_res_blocks] * levels
    if len(num_res_blocks) != levels:
        raise UserError(f"num_res_blocks has {len(num_res_blocks)} entries, channel_mult {levels}; give one per level")
    return list(num_res_blocks)
