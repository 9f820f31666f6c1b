"""The U-Net that predicts the noise (Dhariwal & Nichol 2021, arXiv:2105.05233; Rombach et al. 2022, arXiv:2112.10752).

Shapes: B batch, C channels, H, W of the latent, E = 4 * model_channels the width of the timestep's embedding.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer, name_text_layers, projected_at_once
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.util import default


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the timestep's embedding and the context to those of its layers that read them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | PromptContext | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Doubles height and width by repetition, then convolves if `use_conv`; with dims=3 depth stays as it is."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.scale = [1.0, 2.0, 2.0] if dims == 3 else [2.0] * dims
        self.use_conv = use_conv
        if use_conv:
            self.conv = conv_nd(dims, channels, default(out_channels, channels), 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        larger = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return self.conv(larger) if self.use_conv else larger


class Downsample(nn.Module):
    """Halves height and width, by a strided convolution or by averaging; with dims=3 depth stays as it is."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, default(out_channels, channels), 3, stride=stride, padding=padding)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two convolutions around the timestep's embedding, with a residual; may change channels and resolution.

    Args:
        channels, out_channels: of input and output (None: the same).
        emb_channels: E.
        use_conv: the residual changes channels by a 3x3 convolution instead of 1x1.
        use_scale_shift_norm: the embedding scales and shifts the second norm instead of being added.
        up, down: double or halve the resolution before the first convolution.
    """

    def __init__(
        self, channels: int, emb_channels: int, dropout: float, out_channels: int | None = None,
        use_conv: bool = False, use_scale_shift_norm: bool = False, dims: int = 2, use_checkpoint: bool = False,
        up: bool = False, down: bool = False,
    ) -> None:
        super().__init__()
        width = default(out_channels, channels)
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, width, 3, padding=1)
        )
        self.resample = Upsample(channels, False, dims) if up else Downsample(channels, False, dims) if down else None
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, 2 * width if use_scale_shift_norm else width))
        self.out_layers = nn.Sequential(
            normalization(width), nn.SiLU(), nn.Dropout(dropout),
            zero_module(conv_nd(dims, width, width, 3, padding=1)),
        )
        kernel = 3 if use_conv else 1
        self.skip_connection = (
            nn.Identity() if width == channels else conv_nd(dims, channels, width, kernel, padding=kernel // 2)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, channels, H, W), emb (B, E); returns (B, out_channels, H', W')."""
        return checkpoint(self._residual, x, emb, flag=self.use_checkpoint)

    def _residual(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self._enter(x)
        added = self.emb_layers(emb).to(h.dtype)
        added = added.view(*added.shape, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = added.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + added)
        return self.skip_connection(x if self.resample is None else self.resample(x)) + h

    def _enter(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return self.in_layers(x)
        return self.in_layers[2](self.resample(self.in_layers[:2](x)))


class QKVAttention(nn.Module):
    """Attention on queries, keys and values stacked along the channels: (B, 3*C, L) to (B, C, L).

    `heads_first` tells the order of the stack: each head's q, k and v together (the older order), or all heads' q,
    then all k, then all v (`use_new_attention_order`).
    """

    def __init__(self, n_heads: int, heads_first: bool = False) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.heads_first = heads_first

    def forward(self, qkv: Tensor) -> Tensor:
        sizes, stack = ((self.n_heads, 3, -1), 2) if self.heads_first else ((3, self.n_heads, -1), 1)
        parts = qkv.unflatten(1, sizes).transpose(-1, -2).unbind(stack)
        return F.scaled_dot_product_attention(*parts).transpose(-1, -2).flatten(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map of any number of dimensions, with a residual.

    `num_head_channels`, unless -1, decides the number of heads instead of `num_heads`.
    """

    def __init__(
        self, channels: int, num_heads: int = 1, num_head_channels: int = -1, use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if channels % heads or (num_head_channels != -1 and channels % num_head_channels):
            raise UserError(f"{channels} channels do not divide into attention heads; "
                            f"change num_heads ({num_heads}) or num_head_channels ({num_head_channels})")
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = QKVAttention(heads, heads_first=not use_new_attention_order)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) to the same shape."""
        return checkpoint(self._residual, x, flag=self.use_checkpoint)

    def _residual(self, x: Tensor) -> Tensor:
        attended = self.attention(self.qkv(self.norm(x).flatten(2)))
        return x + self.proj_out(attended).view(x.shape)


class UNetModel(nn.Module):
    """The U-Net of latent diffusion, with attention to a context where `use_spatial_transformer` is set.

    Args:
        image_size: height and width of the latent; kept for reference, any size that the downsampling divides works.
        num_res_blocks: per level, one number for all levels or one for each.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which there is attention.
        channel_mult: channels of each level, in multiples of `model_channels`.
        conv_resample: convolve when changing resolution; `resblock_updown` does it by residual blocks instead.
        num_classes: number of classes of a class-conditional model, whose forward takes `y`.
        num_heads, num_head_channels: give one; the second, if given, decides.
        num_heads_upsample: number of heads in the upward half, if another (no spatial transformer, legacy only).
        context_dim: width of the context that the spatial transformers read.
        legacy: how the first models counted heads, see `_attention`.
        use_linear_in_transformer: as in Stable Diffusion 2.
        use_fp16: kept for the public configs; `ldm.modules.fast.sixteen_bits` and autocast decide what is computed in 16.

    Raises:
        UserError: a param that is not supported, or params that contradict each other.
    """

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int,
        num_res_blocks: int | Sequence[int], attention_resolutions: Iterable[int], dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8), conv_resample: bool = True, dims: int = 2,
        num_classes: int | None = None, use_checkpoint: bool = False, use_fp16: bool = False, num_heads: int = -1,
        num_head_channels: int = -1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False,
        resblock_updown: bool = False, use_new_attention_order: bool = False, use_spatial_transformer: bool = False,
        transformer_depth: int = 1, context_dim: int | None = None, n_embed: int | None = None, legacy: bool = True,
        use_linear_in_transformer: bool = False,
    ) -> None:
        super().__init__()
        _refuse_unsupported(n_embed=n_embed)
        if num_heads == -1 and num_head_channels == -1:
            raise UserError("UNetModel: give num_heads or num_head_channels")
        if use_spatial_transformer != (context_dim is not None):
            raise UserError("UNetModel: use_spatial_transformer and context_dim go together; give both or neither")
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.dims, self.dropout = model_channels, dims, dropout
        self.channel_mult = tuple(channel_mult)
        self.num_res_blocks = _per_level(num_res_blocks, len(self.channel_mult))
        self.attention_resolutions = frozenset(attention_resolutions)
        self.conv_resample, self.resblock_updown = conv_resample, resblock_updown
        self.num_classes, self.use_checkpoint = num_classes, use_checkpoint
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm, self.use_new_attention_order = use_scale_shift_norm, use_new_attention_order
        self.use_spatial_transformer, self.transformer_depth = use_spatial_transformer, transformer_depth
        self.context_dim, self.legacy, self.use_linear_in_transformer = context_dim, legacy, use_linear_in_transformer

        self.time_embed = self._time_embedding()
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self._embedding_channels)
        self.input_blocks, skips = self._downward_half()
        self.middle_block = self._middle(skips[-1])
        self.output_blocks = self._upward_half(skips)
        last = model_channels * self.channel_mult[0]
        self.out = nn.Sequential(
            normalization(last), nn.SiLU(), zero_module(conv_nd(dims, last, out_channels, 3, padding=1))
        )
        self.text_layers = name_text_layers(self)

    @property
    def _embedding_channels(self) -> int:
        return 4 * self.model_channels

    def _time_embedding(self) -> nn.Sequential:
        width = self._embedding_channels
        return nn.Sequential(linear(self.model_channels, width), nn.SiLU(), linear(width, width))

    def _downward_half(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks, and the channels that each of them hands over to the upward half."""
        channels = self.model_channels
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, channels, 3, padding=1))]
        skips = [channels]
        for level, multiple in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks[level]):
                block = [self._residual(channels, channels := multiple * self.model_channels)]
                blocks.append(TimestepEmbedSequential(*block, *self._attention_at(level, channels, self.num_heads)))
                skips.append(channels)
            if level + 1 < len(self.channel_mult):
                blocks.append(TimestepEmbedSequential(self._resampling(channels, up=False)))
                skips.append(channels)
        return nn.ModuleList(blocks), skips

    def _middle(self, channels: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(
            self._residual(channels, channels),
            self._attention(channels, self.num_heads),
            self._residual(channels, channels),
        )

    def _upward_half(self, skips: Sequence[int]) -> nn.ModuleList:
        waiting, channels, blocks = list(skips), skips[-1], []
        for level, multiple in reversed(list(enumerate(self.channel_mult))):
            for remaining in reversed(range(self.num_res_blocks[level] + 1)):
                block = [self._residual(channels + waiting.pop(), channels := multiple * self.model_channels)]
                block += self._attention_at(level, channels, self.num_heads_upsample)
                if level and not remaining:
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

    def _attention_at(self, level: int, channels: int, heads: int) -> list[nn.Module]:
        return [self._attention(channels, heads)] if 2 ** level in self.attention_resolutions else []

    def _attention(self, channels: int, block_heads: int) -> nn.Module:
        """Attention for this many channels, in `num_heads` heads, or in heads of `num_head_channels` if that is given.

        One exception: an `AttentionBlock` of a legacy model without `num_head_channels` has `block_heads` heads. (In
        the public code `legacy` seems to decide more, but where channels divide into heads nothing else remains.)
        """
        by_width = self.num_head_channels != -1
        heads = channels // self.num_head_channels if by_width else self.num_heads
        if heads < 1 or channels % (self.num_head_channels if by_width else heads):
            raise UserError(f"UNetModel: {channels} channels do not divide into attention heads; "
                            f"change num_heads ({self.num_heads}) or num_head_channels ({self.num_head_channels})")
        if self.use_spatial_transformer:
            return SpatialTransformer(
                channels, heads, channels // heads, self.transformer_depth, context_dim=self.context_dim,
                use_linear=self.use_linear_in_transformer, use_checkpoint=self.use_checkpoint,
            )
        return AttentionBlock(
            channels, block_heads if self.legacy and not by_width else heads, use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def forward(
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | PromptContext | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noise (or what else the model was trained for).

        Args:
            x: noisy latents (B, in_channels, H, W).
            timesteps: (B,), counted as in training, 0 .. T-1.
            context: encoded prompts (B, N, context_dim), for a model with `context_dim`.
            y: class labels (B,), for a model with `num_classes`.

        Returns:
            (B, out_channels, H, W)

        Raises:
            ValueError: timesteps, context or labels are missing, or given to a model that does not read them.
        """
        self._check_inputs(timesteps, context, y)
        if self.dtype == torch.float32:
            return self._predict(x, timesteps, context, y)
        with torch.autocast(x.device.type, enabled=False):  # it would turn norms back to 32 bits
            return self._predict(x.to(self.dtype), timesteps, context, y).to(x.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights; see `ldm.modules.fast.sixteen_bits`."""
        return self.out[-1].weight.dtype

    def _predict(self, x: Tensor, timesteps: Tensor, context: Tensor | PromptContext | None, y: Tensor | None
                 ) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        context = projected_at_once(context, self.text_layers)
        passed = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            passed.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, passed.pop()], dim=1), emb, context)
        return self.out(x)

    def _check_inputs(
        self, timesteps: Tensor | None, context: Tensor | PromptContext | None, labels: Tensor | None
    ) -> None:
        expected = {
            "timesteps": (timesteps, True),
            "context": (context, self.context_dim is not None),
            "y (class labels)": (labels, self.num_classes is not None),
        }
        for name, (given, needed) in expected.items():
            if (given is not None) != needed:
                raise ValueError(f"this UNetModel {'needs' if needed else 'has no use for'} {name}")


def _refuse_unsupported(**params: object) -> None:
    given = [name for name, value in params.items() if value]
    if given:
        raise UserError(f"UNetModel: {', '.join(given)} is not supported; leave it out of the config")


def _per_level(numbers: int | Sequence[int], levels: int) -> tuple[int, ...]:
    if isinstance(numbers, int):
        return (numbers,) * levels
    if len(numbers) != levels:
        raise UserError(f"num_res_blocks has {len(numbers)} entries, channel_mult {levels}; give one per level")
    return tuple(numbers)
