"""The first half of the U-Net as a classifier of noisy latents (Dhariwal & Nichol 2021, section 4)."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.unet_base import UNetBase
from ldm.modules.diffusionmodules.unet_blocks import AttentionPool2d
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module

HIDDEN_WIDTH = 2048  # between the two layers of the "spatial" pools
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class EncoderUNetModel(UNetBase):
    """A U-Net without its second half, which pools features to (B, out_channels).

    Args:
        pool: "adaptive" for the mean over positions and a projection, "attention" for `AttentionPool2d`, "spatial" and
            "spatial_v2" for two layers on the means of all blocks' features, the second with a norm.
        others: as in `UNetModel`; further ones are not read.

    Raises:
        UserError: if `pool` is unknown, or "attention" without `num_head_channels`.
    """

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int,
        num_res_blocks: int | Sequence[int], attention_resolutions: Iterable[int], dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8), conv_resample: bool = True, dims: int = 2,
        use_checkpoint: bool = False, use_fp16: bool = False, num_heads: int = 1, num_head_channels: int = -1,
        num_heads_upsample: int = -1, use_scale_shift_norm: bool = False, resblock_updown: bool = False,
        use_new_attention_order: bool = False, pool: str = "adaptive", *args: Any, **kwargs: Any,
    ) -> None:
        super().__init__(
            image_size=image_size, in_channels=in_channels, model_channels=model_channels, out_channels=out_channels,
            num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions, dropout=dropout,
            channel_mult=channel_mult, conv_resample=conv_resample, dims=dims, use_checkpoint=use_checkpoint,
            use_fp16=use_fp16, num_heads=num_heads, num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order,
        )
        if pool not in POOLS:
            raise UserError(f"EncoderUNetModel: pool {pool!r} is unknown; choose one of {', '.join(POOLS)}")
        self.pool = pool
        self.time_embed = self._time_embedding()
        self.input_blocks, widths = self._build_encoder()
        self.middle_block = self._build_middle(widths[-1])
        self.out = self._build_pool(widths[-1], sum(widths) + widths[-1])

    def _build_pool(self, channels: int, all_channels: int) -> nn.Sequential:
        """Return the last layers, for the features of the last block or, in the "spatial" pools, of all blocks."""
        if self.pool == "adaptive":
            projection = zero_module(conv_nd(self.dims, channels, self.out_channels, 1))
            return nn.Sequential(normalization(channels), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), projection,
                                 nn.Flatten())
        if self.pool == "attention":
            if self.num_head_channels == -1:
                raise UserError("EncoderUNetModel: pool attention needs num_head_channels")
            side = self.image_size // 2 ** (len(self.channel_mult) - 1)
            pool = AttentionPool2d(side, channels, self.num_head_channels, self.out_channels)
            return nn.Sequential(normalization(channels), nn.SiLU(), pool)
        middle = [nn.ReLU()] if self.pool == "spatial" else [normalization(HIDDEN_WIDTH), nn.SiLU()]
        return nn.Sequential(nn.Linear(all_channels, HIDDEN_WIDTH), *middle, nn.Linear(HIDDEN_WIDTH, self.out_channels))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Map noisy latents (B, in_channels, H, W) at timesteps (B,) to (B, out_channels)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        means = []
        for block in (*self.input_blocks, self.middle_block):
            x = block(x, emb)
            means.append(x.flatten(2).mean(-1))
        return self.out(torch.cat(means, dim=-1) if self.pool.startswith("spatial") else x)
