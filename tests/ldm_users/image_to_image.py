"""Noise a picture up to a strength and denoise it with a prompt (SDEdit), by DDIM's own methods."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler


@torch.no_grad()
def redraw(model: Any, image: Tensor, prompts: Sequence[str], strength: float = 0.75, steps: int = 4,
           scale: float = 5.0) -> Tensor:
    """Return latents (B, C, H, W) for an image (B, 3, H, W) in [-1, 1]."""
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=steps, ddim_eta=0.0, verbose=False)
    start = model.get_first_stage_encoding(model.encode_first_stage(image))
    uncond, cond = (model.get_learned_conditioning(texts) for texts in ([""] * len(prompts), list(prompts)))
    kept = int(strength * steps)
    noisy = sampler.stochastic_encode(start, torch.tensor([kept] * len(prompts)))
    return sampler.decode(noisy, cond, kept, unconditional_guidance_scale=scale, unconditional_conditioning=uncond)
