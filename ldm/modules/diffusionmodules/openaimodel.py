"""The U-Net that predicts the noise (Dhariwal & Nichol 2021, arXiv:2105.05233; Rombach et al. 2022, arXiv:2112.10752).

Shapes: B batch size, C channels, H and W height and width of the latent, E = 4 * model_channels width of the timestep
embedding.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer, name_text_layers, precompute_keys_values
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
    """A sequence of layers, which passes the timestep embedding and the context to the layers that read them."""

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
    """Double height and width by repetition, then apply a convolution if `use_conv`. With dims=3 the depth stays."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.scale = [1.0, 2.0, 2.0] if dims == 3 else [2.0] * dims
        self.use_conv = use_conv
        if use_conv:
            self.conv = conv_nd(dims, channels, default(out_channels, channels), 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve height and width, by a strided convolution if `use_conv`, or by averaging. With dims=3 depth stays."""

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
    """A residual block of two convolutions, with the timestep embedding in between.

    Args:
        channels: channels of the input.
        emb_channels: E.
        dropout: dropout rate in front of the second convolution.
        out_channels: channels of the output; None: the same.
        use_conv: whether the skip connection changes channels by a 3x3 convolution instead of a 1x1 one.
        use_scale_shift_norm: whether the embedding scales and shifts the second norm instead of being added.
        dims: number of spatial dimensions, 1, 2 or 3.
        use_checkpoint: whether to recompute activations in the backward pass.
        up, down: whether to double or halve the resolution before the first convolution.
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
        """Compute (B, out_channels, H', W') from x (B, channels, H, W) and emb (B, E)."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self._apply_in_layers(x)
        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.view(*emb_out.shape, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x if self.resample is None else self.resample(x)) + h

    def _apply_in_layers(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return self.in_layers(x)
        return self.in_layers[2](self.resample(self.in_layers[:2](x)))


class QKVAttention(nn.Module):
    """Attention of queries, keys and values that are stacked along the channels; maps (B, 3*C, L) to (B, C, L).

    Args:
        n_heads: number of heads.
        heads_first: order of the stack. True: q, k and v of the first head, then those of the second (the older order).
            False: q of all heads, then k, then v (`use_new_attention_order`).
    """

    def __init__(self, n_heads: int, heads_first: bool = False) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.heads_first = heads_first

    def forward(self, qkv: Tensor) -> Tensor:
        sizes, stack = ((self.n_heads, 3, -1), 2) if self.heads_first else ((3, self.n_heads, -1), 1)
        query, key, value = qkv.unflatten(1, sizes).transpose(-1, -2).unbind(stack)
        return F.scaled_dot_product_attention(query, key, value).transpose(-1, -2).flatten(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map of any number of dimensions, with a residual.

    Args:
        channels: C.
        num_heads: number of heads, if `num_head_channels` is -1.
        num_head_channels: channels per head.
        use_checkpoint: whether to recompute activations in the backward pass.
        use_new_attention_order: see `QKVAttention`.

    Raises:
        UserError: if the channels do not divide into heads.
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
        """Map x (B, C, ...) to a tensor of the same shape."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.qkv(self.norm(x).flatten(2)))
        return x + self.proj_out(attended).view(x.shape)


class UNetModel(nn.Module):
    """The U-Net of latent diffusion, with attention to a context if `use_spatial_transformer` is set.

    Args:
        image_size: height and width of the latent, for reference: any size that the downsampling divides works.
        in_channels, out_channels: channels of the noisy latent and of the prediction.
        model_channels: channels of the first level.
        num_res_blocks: number of residual blocks per level, one number for all levels or one for each.
        attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels with attention.
        dropout: dropout rate.
        channel_mult: channels of each level, in multiples of `model_channels`.
        conv_resample: whether to change resolution by convolutions.
        dims: number of spatial dimensions, 1, 2 or 3.
        num_classes: number of classes of a class-conditional model, whose forward takes `y`.
        use_checkpoint: whether to recompute activations in the backward pass.
        num_heads, num_head_channels: number of heads, or channels per head; the second has precedence.
        num_heads_upsample: number of heads in the decoder half, if different (for `AttentionBlock` and legacy only).
        use_scale_shift_norm: see `ResBlock`.
        resblock_updown: whether to change resolution by residual blocks.
        use_new_attention_order: see `QKVAttention`.
        use_spatial_transformer: whether attention reads a context.
        transformer_depth: number of transformer blocks per spatial transformer.
        context_dim: width of the context.
        n_embed: not supported.
        legacy: how the first models counted heads, see `_attention`.
        use_linear_in_transformer: see `SpatialTransformer`; true for Stable Diffusion 2.
        use_fp16: ignored, kept for the public configs; `ldm.modules.fast` and autocast choose the precision.

    Raises:
        UserError: if a param is not supported, or params contradict each other.
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
        if n_embed:
            raise UserError("UNetModel: n_embed is not supported; leave it out of the config")
        if num_heads == -1 and num_head_channels == -1:
            raise UserError("UNetModel: give num_heads or num_head_channels")
        if use_spatial_transformer != (context_dim is not None):
            raise UserError("UNetModel: use_spatial_transformer and context_dim go together; give both or neither")
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.dims, self.dropout = model_channels, dims, dropout
        self.channel_mult = tuple(channel_mult)
        self.num_res_blocks = _blocks_per_level(num_res_blocks, len(self.channel_mult))
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
        self.input_blocks, skips = self._build_encoder()
        self.middle_block = self._build_middle(skips[-1])
        self.output_blocks = self._build_decoder(skips)
        channels = model_channels * self.channel_mult[0]
        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        )
        self.text_layers = name_text_layers(self)

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
            for _ in range(self.num_res_blocks[level]):
                residual = self._residual(channels, width)
                channels = width
                attention = self._attention_at(level, channels, self.num_heads)
                blocks.append(TimestepEmbedSequential(residual, *attention))
                skips.append(channels)
            if level + 1 < len(self.channel_mult):
                blocks.append(TimestepEmbedSequential(self._resampling(channels, up=False)))
                skips.append(channels)
        return nn.ModuleList(blocks), skips

    def _build_middle(self, channels: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(
            self._residual(channels, channels),
            self._attention(channels, self.num_heads),
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
                block += self._attention_at(level, channels, self.num_heads_upsample)
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

    def _attention_at(self, level: int, channels: int, heads: int) -> list[nn.Module]:
        return [self._attention(channels, heads)] if 2 ** level in self.attention_resolutions else []

    def _attention(self, channels: int, block_heads: int) -> nn.Module:
        """Build the attention for `channels`, with `num_heads` heads, or with heads of `num_head_channels` if given.

        There is one exception: an `AttentionBlock` of a legacy model without `num_head_channels` has `block_heads`
        heads. (In the public code `legacy` seems to affect more. But if the channels divide into heads, this is all.)
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
        """Predict the noise, or whatever else the model was trained to predict.

        Args:
            x: noisy latents (B, in_channels, H, W).
            timesteps: (B,), training timesteps from 0 to T - 1.
            context: encoded prompts (B, N, context_dim), for a model with `context_dim`.
            y: class labels (B,), for a model with `num_classes`.

        Returns:
            (B, out_channels, H, W)

        Raises:
            ValueError: if timesteps, context or labels are missing, or given to a model that does not read them.
        """
        self._check_inputs(timesteps, context, y)
        if self.dtype == torch.float32:
            return self._predict(x, timesteps, context, y)
        with torch.autocast(x.device.type, enabled=False):  # autocast would compute norms in 32 bits
            return self._predict(x.to(self.dtype), timesteps, context, y).to(x.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; 16 bits after `ldm.modules.fast.sixteen_bits.to_sixteen_bits`."""
        return self.out[-1].weight.dtype

    def _predict(self, x: Tensor, timesteps: Tensor, context: Tensor | PromptContext | None, y: Tensor | None
                 ) -> Tensor:
        # Embed the timesteps and the classes.
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)

        # Compute the keys and values of the prompts, those of all layers at once. Concepts edit them here.
        context = precompute_keys_values(context, self.text_layers)

        # Go down to the lowest resolution and up again, with skip connections.
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
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


def _blocks_per_level(num_res_blocks: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Return `num_res_blocks` with one entry per level."""
    if isinstance(num_res_blocks, int):
        return (num_res_blocks,) * levels
    if len(num_res_blocks) != levels:
        raise UserError(f"num_res_blocks has {len(num_res_blocks)} entries, channel_mult {levels}; give one per level")
    return tuple(num_res_blocks)
