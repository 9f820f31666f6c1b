"""Edit a picture by an instruction: a hybrid model, whose conditions are a text and an encoded picture."""
from __future__ import annotations

from typing import Any

import torch
from ldm_users.sigma_denoiser import Guided, SigmaDenoiser, euler
from torch import Tensor


@torch.no_grad()
def edit(model: Any, image: Tensor, instruction: str, sigmas: Tensor, text_scale: float = 7.5,
         image_scale: float = 1.5) -> Tensor:
    """Return latents (1, C, H, W) for an image (1, 3, H, W) in [-1, 1]."""
    cond = {"c_crossattn": [model.get_learned_conditioning([instruction])],
            "c_concat": [model.encode_first_stage(image).mode()]}
    uncond = {"c_crossattn": [model.get_learned_conditioning([""])],
              "c_concat": [torch.zeros_like(cond["c_concat"][0])]}
    z = torch.randn_like(cond["c_concat"][0]) * sigmas[0]
    return euler(Guided(SigmaDenoiser(model)), z, sigmas, cond=cond, uncond=uncond, text_scale=text_scale,
                 image_scale=image_scale)
