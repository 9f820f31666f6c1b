"""A subclass in the manner of ControlNet: a trainable copy of the U-Net's first half that sees a control image."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import conv_nd, timestep_embedding, zero_module
from ldm.util import instantiate_from_config


class ControlledUNet(UNetModel):
    """The frozen U-Net; `control` is added to its middle and to its skip connections."""

    def forward(self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None,
                control: list[Tensor] | None = None, **kwargs: Any) -> Tensor:
        skips = []
        with torch.no_grad():
            emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
            h = x.type(self.dtype)
            for block in self.input_blocks:
                h = block(h, emb, context)
                skips.append(h)
            h = self.middle_block(h, emb, context)
        remaining = list(control or [])
        if remaining:
            h = h + remaining.pop()
        for block in self.output_blocks:
            skip = skips.pop()
            h = block(torch.cat([h, skip + remaining.pop() if remaining else skip], dim=1), emb, context)
        return self.out(h.type(x.dtype))


class ControlBranch(UNetModel):
    """The copy: its input and middle blocks, with a zero convolution after each."""

    def __init__(self, hint_channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs, out_channels=kwargs["in_channels"])
        del self.output_blocks, self.out
        self.hint = TimestepEmbedSequential(conv_nd(2, hint_channels, 8, 3, padding=1, stride=2), nn.SiLU(),
                                            zero_module(conv_nd(2, 8, self.model_channels, 3, padding=1)))
        channels = [self._channels_of(block) for block in self.input_blocks]
        self.zero_convs = nn.ModuleList([TimestepEmbedSequential(zero_module(conv_nd(2, count, count, 1)))
                                         for count in [*channels, channels[-1]]])

    def _channels_of(self, block: nn.Module) -> int:
        layer = block[0]
        return getattr(layer, "out_channels")  # noqa: B009

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> list[Tensor]:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        guided = self.hint(hint, emb, context)
        h, outs = x, []
        for index, (block, zero) in enumerate(zip(self.input_blocks, self.zero_convs, strict=False)):
            h = block(h, emb, context)
            h = h + guided if index == 0 else h
            outs.append(zero(h, emb, context))
        return [*outs, self.zero_convs[-1](self.middle_block(h, emb, context), emb, context)]


class ControlledDiffusion(LatentDiffusion):
    """LatentDiffusion whose condition is a dict: the text, and the control image as it comes."""

    def __init__(self, control_stage_config: Any, control_key: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key

    @torch.no_grad()
    def get_input(self, batch: dict[str, Any], k: str, bs: int | None = None, *args: Any, **kwargs: Any) -> Any:
        latents, text = super().get_input(batch, self.first_stage_key, *args, bs=bs, **kwargs)
        control = batch[self.control_key][:bs].to(self.device).permute(0, 3, 1, 2).float().contiguous()
        return latents, {"c_crossattn": [text], "c_concat": [control]}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        unet, context = self.model.diffusion_model, torch.cat(cond["c_crossattn"], 1)
        if cond.get("c_concat") is None:
            return unet(x=x_noisy, timesteps=t, context=context, control=None)
        control = self.control_model(x=x_noisy, hint=torch.cat(cond["c_concat"], 1), timesteps=t, context=context)
        return unet(x=x_noisy, timesteps=t, context=context, control=control)

    @torch.no_grad()
    def sample_log(self, cond: dict[str, Any], batch_size: int, ddim: bool, ddim_steps: int, **kwargs: Any) -> Any:
        shape = (self.channels, *cond["c_concat"][0].shape[2:])
        size = (shape[0], shape[1] // 2, shape[2] // 2)
        return DDIMSampler(self).sample(ddim_steps, batch_size, size, cond, verbose=False, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.control_model.parameters(), lr=self.learning_rate)
