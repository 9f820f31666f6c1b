"""Samples of classes, guided against the last class, which stands for "none"."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler


@torch.no_grad()
def sample_classes(model: Any, classes: Sequence[int], none: int, per_class: int = 2, steps: int = 3,
                   scale: float = 3.0, eta: float = 0.0) -> list[Tensor]:
    """Return latents (per_class, C, H, W) for each class."""
    sampler = DDIMSampler(model)
    with model.ema_scope():
        uncond = model.get_learned_conditioning({model.cond_stage_key: torch.tensor(per_class * [none])})
        found = []
        for label in classes:
            labels = torch.tensor(per_class * [label])
            cond = model.get_learned_conditioning({model.cond_stage_key: labels})
            latents, _ = sampler.sample(S=steps, conditioning=cond, batch_size=per_class, shape=[4, 8, 8],
                                        verbose=False, unconditional_guidance_scale=scale,
                                        unconditional_conditioning=uncond, eta=eta)
            found.append(latents)
        return found
