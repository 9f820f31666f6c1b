"""A subclass in the manner of Custom Diffusion: train the keys and values that read the text, with regularisation."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.util import default


class KeyValueFinetuning(LatentDiffusion):
    """Fine-tunes `to_k` and `to_v` of every text layer; a batch carries a mask of the pixels that count."""

    def __init__(self, mask_key: str = "mask", *args: Any, **kwargs: Any) -> None:
        self.mask_key = mask_key
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for layer in self.text_layers():
            for linear in (layer.to_k, layer.to_v):
                linear.weight.requires_grad = True
        for block in self.model.diffusion_model.modules():  # what enters the first block needs no gradient
            if type(block) == BasicTransformerBlock:  # noqa: E721
                block.checkpoint = False

    def text_layers(self) -> list[nn.Module]:
        return [layer for name, layer in self.model.diffusion_model.named_modules()
                if type(layer) == CrossAttention and "attn2" in name]  # noqa: E721

    def get_input(self, batch: dict[str, Any], k: str, **kwargs: Any) -> list[Any]:
        latents, condition = super().get_input(batch, k, force_c_encode=True, **kwargs)[:2]
        mask = batch[self.mask_key][:, None].to(latents)
        return [latents, {"c_crossattn": [condition], "mask": nn.functional.interpolate(mask, latents.shape[-2:])}]

    def p_losses(self, x_start: Tensor, cond: dict[str, Any], t: Tensor, noise: Tensor | None = None
                 ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = default(noise, lambda: torch.randn_like(x_start))
        mask = cond.pop("mask")
        output = self.apply_model(self.q_sample(x_start=x_start, t=t, noise=noise), t, cond)
        error = self.get_loss(output, noise, mean=False)
        loss = ((error * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
        prefix = "train" if self.training else "val"
        return loss, {f"{prefix}/loss_simple": loss.detach(), f"{prefix}/loss": loss.detach()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)
