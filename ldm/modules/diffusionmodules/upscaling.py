"""Models of the small image that a super-resolution model sees: they noise it, by a schedule of their own.

Source: Ho et al. 2022, "Cascaded Diffusion Models", section 4.2 (conditioning augmentation); names as in Stability's
stablediffusion.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule


class AbstractLowScaleModel(nn.Module):
    """Base class: small images (B, C, H, W) go to the U-Net as they are.

    Args:
        noise_schedule_config: params of `register_schedule`; None: no schedule.

    Attributes:
        betas, alphas_cumprod, ...: tables of the schedule, (T,), as `DDPM` has them.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(self, beta_schedule: str = "linear", timesteps: int = 1000, linear_start: float = 1e-4,
                          linear_end: float = 2e-2, cosine_s: float = 8e-3) -> None:
        """Set the tables of a schedule that `make_beta_schedule` knows."""
        betas = torch.as_tensor(make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s))
        alpha_bar = torch.cumprod(1 - betas, 0)
        tables = {"betas": betas, "alphas_cumprod": alpha_bar,
                  "alphas_cumprod_prev": torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]),
                  "sqrt_alphas_cumprod": alpha_bar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
                  "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
                  "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
                  "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt()}
        for name, table in tables.items():
            self.register_buffer(name, table.float())
        self.num_timesteps, self.linear_start, self.linear_end = len(betas), linear_start, linear_end

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_start (B, ...) with the noise of timesteps t (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
                + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the U-Net sees of small images, and their levels of noise (B,), if there are any."""
        return x, None

    def decode(self, x: Tensor) -> Tensor:
        """Return the images of what `forward` returned."""
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """Small images without noise, at level 0."""

    def __init__(self) -> None:
        super().__init__()
        self.max_noise_level = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x), device=x.device, dtype=torch.long)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """Small images with noise of a random or a given level.

    Args:
        noise_schedule_config: params of `register_schedule`.
        max_noise_level: random levels are below it.
        to_cuda: ignored, kept for the public configs.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000, to_cuda: bool = False
                 ) -> None:
        super().__init__(noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return noised x (B, ...) and the levels (B,), by default random ones."""
        noise_level = self.random_levels(x) if noise_level is None else noise_level
        return self.q_sample(x, noise_level), noise_level

    def random_levels(self, x: Tensor) -> Tensor:
        """Return a level for each sample of x (B, ...)."""
        return torch.randint(0, self.max_noise_level, (len(x),), device=x.device)
