"""Images for prompts, batch after batch, with one of the family's three samplers."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}


@torch.no_grad()
def generate(model: Any, prompts: Sequence[str], sampler: str = "ddim", steps: int = 4, scale: float = 7.5,
             eta: float = 0.0, iterations: int = 2, fixed_start: bool = False) -> list[Tensor]:
    """Return a batch of images in [0, 1], (B, 3, H, W), for each iteration; noise is taken from torch's generator."""
    drawer = SAMPLERS[sampler](model)
    shape = [model.channels, model.image_size, model.image_size]
    start = torch.randn([len(prompts), *shape]) if fixed_start else None
    batches = []
    with model.ema_scope() if model.use_ema else nullcontext():
        for _ in range(iterations):
            uncond = model.get_learned_conditioning(len(prompts) * [""]) if scale != 1.0 else None
            cond = model.get_learned_conditioning(list(prompts))
            latents, _ = drawer.sample(S=steps, conditioning=cond, batch_size=len(prompts), shape=shape, verbose=False,
                                       unconditional_guidance_scale=scale, unconditional_conditioning=uncond, eta=eta,
                                       x_T=start)
            batches.append(((model.decode_first_stage(latents) + 1) / 2).clamp(0, 1))
    return batches
