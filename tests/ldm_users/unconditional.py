"""Samples of an unconditional model: by all steps of the Markov chain, or by DDIM."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler


@torch.no_grad()
def sample(model: Any, batch_size: int, ddim_steps: int | None = None, eta: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Return latents and what was kept on the way; without `ddim_steps`, all steps of training are made."""
    shape = [model.model.diffusion_model.in_channels, model.model.diffusion_model.image_size,
             model.model.diffusion_model.image_size]
    with model.ema_scope("Plotting"):
        if ddim_steps is None:
            return model.progressive_denoising(None, [batch_size, *shape], verbose=False)
        latents, kept = DDIMSampler(model).sample(ddim_steps, batch_size=batch_size, shape=shape, eta=eta,
                                                  verbose=False)
        return latents, kept["x_inter"]
