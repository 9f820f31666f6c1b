"""The training objective: what a diffusion network predicts, and how its errors are weighted.

Ho et al. 2020 (DDPM), Eq. 14: the plain squared error; Salimans & Ho 2022: v-prediction; Tewel et al. 2023 (Perfusion):
a soft mask of the subject weights the error at each position.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.sampling.schedule import NoiseSchedule, check_parameterization, get_v

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target).square(),
}


def check_loss_type(name: str) -> None:
    """Raise UserError unless `name` is a known loss type."""
    if name not in ERRORS:
        raise UserError(f"loss_type {name!r} is unknown; choose one of {', '.join(ERRORS)}")


def training_target(schedule: NoiseSchedule, parameterization: str, x_start: Tensor, noise: Tensor,
                    t: Tensor) -> Tensor:
    """Return what the network should predict at x_t: noise, image or velocity, (B, C, H, W)."""
    check_parameterization(parameterization)
    if parameterization == "v":
        return get_v(schedule, x_start, noise, t)
    return noise if parameterization == "eps" else x_start


def resize_mask_to_latents(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Average a mask (B, 1, H, W) in [0, 1] down to the latent grid `size`, (B, 1, h, w), with a maximum of 1."""
    small = torch.nn.functional.interpolate(mask, size=tuple(size), mode="area")
    return small / small.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
