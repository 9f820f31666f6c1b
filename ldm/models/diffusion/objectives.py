"""What a diffusion network is trained towards, and how its errors are weighed.

Ho et al. 2020 (DDPM), Eq. 14: the plain squared error; Salimans & Ho 2022: v-prediction; Tewel et al. 2023 (Perfusion):
a soft mask of the object weighs the error of each position.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.models.diffusion.schedule import NoiseSchedule, check_parameterization, get_v

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target).square(),
}


def check_loss_type(name: str) -> None:
    """Raises a UserError that lists the legal names unless `name` is one of them."""
    if name not in ERRORS:
        raise UserError(f"loss_type {name!r} is unknown; choose one of {', '.join(ERRORS)}")


def training_target(schedule: NoiseSchedule, parameterization: str, x_start: Tensor, noise: Tensor,
                    t: Tensor) -> Tensor:
    """What the network should give for x_t: the noise, the image, or the velocity, (B, C, H, W)."""
    check_parameterization(parameterization)
    if parameterization == "v":
        return get_v(schedule, x_start, noise, t)
    return noise if parameterization == "eps" else x_start


def error_per_sample(prediction: Tensor, target: Tensor, loss_type: str, weight: Tensor | None = None) -> Tensor:
    """Mean error of each sample, (B,), each position weighed by `weight` (B, 1, H, W) in [0, 1] where it is given."""
    error = ERRORS[loss_type](prediction.float(), target.float())
    return (error if weight is None else error * weight).flatten(1).mean(1)


def resize_mask_to_latents(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """A mask (B, 1, H, W) in [0, 1] averaged down to the latent grid `size`, (B, 1, h, w), its maximum back at 1."""
    small = torch.nn.functional.interpolate(mask, size=tuple(size), mode="area")
    return small / small.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
