"""Fill a hole: the U-Net sees the encoded picture with its hole, and the mask, as more input channels."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler


@torch.no_grad()
def fill(model: Any, image: Tensor, mask: Tensor, steps: int = 3) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1]; mask (B, 1, H, W) is 1 in the hole and 0 elsewhere, image in [0, 1]."""
    sampler = DDIMSampler(model)
    image, mask, masked = (2 * picture - 1 for picture in (image, mask, (1 - mask) * image))
    with model.ema_scope():
        seen = model.cond_stage_model.encode(masked)
        condition = torch.cat((seen, F.interpolate(mask, size=seen.shape[-2:])), dim=1)
        shape = (condition.shape[1] - 1, *condition.shape[2:])
        latents, _ = sampler.sample(S=steps, conditioning=condition, batch_size=len(condition), shape=shape,
                                    verbose=False)
        filled = model.decode_first_stage(latents)
    image, mask, filled = (((picture + 1) / 2).clamp(0, 1) for picture in (image, mask, filled))
    return (1 - mask) * image + mask * filled
