"""The U-Net that predicts the noise (Dhariwal & Nichol 2021, arXiv:2105.05233; Rombach et al. 2022, arXiv:2112.10752).

Shapes: B batch size, C channels, H and W height and width of the latent, E = 4 * model_channels width of the timestep
embedding. The blocks are in `unet_blocks`; public code imports them from here.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.attention import SpatialTransformer, exists, name_text_layers, precompute_keys_values
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.encoder_unet import EncoderUNetModel
from ldm.modules.diffusionmodules.unet_base import UNetBase
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    Timestep,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd, linear, normalization, timestep_embedding, zero_module

__all__ = [
    "AttentionBlock", "AttentionPool2d", "Downsample", "EncoderUNetModel", "QKVAttention", "QKVAttentionLegacy",
    "ResBlock", "SpatialTransformer", "Timestep", "TimestepBlock", "TimestepEmbedSequential", "UNetModel", "Upsample",
    "convert_module_to_f16", "convert_module_to_f32", "exists",
]


def convert_module_to_f16(x: nn.Module) -> None:
    """Do nothing, as in latent diffusion: see `UNetModel.convert_to_fp16`."""


def convert_module_to_f32(x: nn.Module) -> None:
    """Do nothing, as in latent diffusion."""


class UNetModel(UNetBase):
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
        num_classes: how a conditional model, whose forward takes `y`, embeds it: a number of classes; "continuous" for
            one number, (B, 1); "sequential" for a vector, (B, adm_in_channels); "timestep" for a number as timesteps
            are, (B,).
        use_checkpoint: whether to recompute activations in the backward pass.
        num_heads, num_head_channels: number of heads, or channels per head; the second has precedence.
        num_heads_upsample: number of heads in the decoder half, if different (for `AttentionBlock` and legacy only).
        use_scale_shift_norm: see `ResBlock`.
        resblock_updown: whether to change resolution by residual blocks.
        use_new_attention_order: see `QKVAttention`.
        use_spatial_transformer: whether attention reads a context.
        transformer_depth: number of transformer blocks per spatial transformer, one number for all levels or one for
            each, as in Stable Diffusion XL.
        context_dim: width of the context.
        n_embed: size of a codebook; the model then predicts logits of its entries, (B, n_embed, H, W).
        legacy: how the first models counted heads, see `_attention`.
        use_linear_in_transformer: see `SpatialTransformer`; true for Stable Diffusion 2.
        disable_self_attentions: for each level, whether its transformers read the context twice instead of attending
            to the image.
        num_attention_blocks: for each level, how many of its residual blocks attention follows; None: all.
        disable_middle_self_attn: as `disable_self_attentions`, for the middle block.
        adm_in_channels: width of the vectors `y` if `num_classes` is "sequential".
        transformer_depth_middle: as `transformer_depth`, for the middle block; None: that of the lowest level.
        use_fp16, use_bf16: the `dtype` to report. `ldm.modules.fast` and autocast choose the precision.

    Raises:
        UserError: if a param is not supported, or params contradict each other.
    """

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int,
        num_res_blocks: int | Sequence[int], attention_resolutions: Iterable[int], dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8), conv_resample: bool = True, dims: int = 2,
        num_classes: int | Literal["continuous", "sequential", "timestep"] | None = None, use_checkpoint: bool = False,
        use_fp16: bool = False, num_heads: int = -1, num_head_channels: int = -1, num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False, resblock_updown: bool = False, use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False, transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None, n_embed: int | None = None, legacy: bool = True,
        use_bf16: bool = False, disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None, disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False, adm_in_channels: int | None = None,
        transformer_depth_middle: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels, out_channels=out_channels,
            num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, dropout=dropout,
            channel_mult=channel_mult, conv_resample=conv_resample, dims=dims, use_checkpoint=use_checkpoint,
            use_fp16=use_fp16, use_bf16=use_bf16, num_heads=num_heads, num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order,
        )
        self.num_classes, self.adm_in_channels = num_classes, adm_in_channels
        self.use_spatial_transformer = use_spatial_transformer
        self.transformer_depth, self.transformer_depth_middle = transformer_depth, transformer_depth_middle
        self.context_dim, self.legacy, self.use_linear_in_transformer = context_dim, legacy, use_linear_in_transformer
        self.disable_self_attentions, self.num_attention_blocks = disable_self_attentions, num_attention_blocks
        self.disable_middle_self_attn = disable_middle_self_attn
        self.predict_codebook_ids = n_embed is not None
        self._check_settings()

        self.time_embed = self._time_embedding()
        if num_classes is not None:
            self.label_emb = self._label_embedding()
        self.input_blocks, skips = self._build_encoder()
        self.middle_block = self._build_middle(skips[-1])
        self.output_blocks = self._build_decoder(skips)
        channels = model_channels * self.channel_mult[0]
        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(channels), conv_nd(dims, channels, n_embed, 1))
        self.text_layers = name_text_layers(self)

    def _check_settings(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise UserError("UNetModel: give num_heads or num_head_channels")
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise UserError("UNetModel: use_spatial_transformer and context_dim go together; give both or neither")
        if self.num_classes == "sequential" and self.adm_in_channels is None:
            raise UserError("UNetModel: num_classes sequential needs adm_in_channels, the width of the vectors y")
        for name in ("disable_self_attentions", "num_attention_blocks", "transformer_depth"):
            values = getattr(self, name)
            if isinstance(values, Sequence) and len(values) != len(self.channel_mult):
                raise UserError(f"UNetModel: {name} has {len(values)} entries, channel_mult {len(self.channel_mult)}; "
                                "give one per level")

    def _label_embedding(self) -> nn.Module:
        width = self._embedding_channels
        if self.num_classes == "continuous":
            return nn.Linear(1, width)
        if self.num_classes == "sequential":
            return nn.Sequential(nn.Sequential(linear(self.adm_in_channels, width), nn.SiLU(), linear(width, width)))
        if self.num_classes == "timestep":
            return nn.Sequential(Timestep(self.model_channels), self._time_embedding())
        return nn.Embedding(self.num_classes, width)

    def forward(
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | PromptContext | None = None,
        y: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:
        """Predict the noise, or whatever else the model was trained to predict.

        Args:
            x: noisy latents (B, in_channels, H, W).
            timesteps: (B,), training timesteps from 0 to T - 1.
            context: encoded prompts (B, N, context_dim), for a model with `context_dim`; others do not read it.
            y: class labels (B,) or vectors (B, adm_in_channels), for a model with `num_classes`.
            kwargs: not read, as in latent diffusion.

        Returns:
            (B, out_channels, H, W)

        Raises:
            ValueError: if timesteps, context or labels are missing, or labels are given to a model without classes.
        """
        self._check_inputs(timesteps, context, y)
        weight_dtype = self._weight_dtype
        if weight_dtype == torch.float32:
            return self._predict(x, timesteps, context, y)
        with torch.autocast(x.device.type, enabled=False):  # autocast would compute norms in 32 bits
            return self._predict(x.to(weight_dtype), timesteps, context, y).to(x.dtype)

    def _predict(self, x: Tensor, timesteps: Tensor, context: Tensor | PromptContext | None, y: Tensor | None
                 ) -> Tensor:
        # Embed the timesteps and the classes.
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(emb.dtype) if self.num_classes == "sequential" else y)

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
        return self.id_predictor(x) if self.predict_codebook_ids else self.out(x)

    def _check_inputs(
        self, timesteps: Tensor | None, context: Tensor | PromptContext | None, labels: Tensor | None
    ) -> None:
        needed = {"timesteps": (timesteps, True), "context": (context, self.context_dim is not None),
                  "y (class labels)": (labels, self.num_classes is not None)}
        for name, (given, is_needed) in needed.items():
            if is_needed and given is None:
                raise ValueError(f"this UNetModel needs {name}")
        if labels is not None and self.num_classes is None:
            raise ValueError("this UNetModel has no use for y (class labels)")
