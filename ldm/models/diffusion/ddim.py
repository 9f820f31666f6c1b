"""DDIM: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models"."""
from __future__ import annotations

import math

from torch import Tensor

from ldm.models.diffusion.sampling import Denoiser, NoiseSource, Sampler, Step, TimeGrid
from ldm.models.diffusion.schedule import Prediction


def ddim_sigma(kept: float, kept_after: float, eta: float) -> float:
    """Standard deviation of the noise that a step from a(t) = `kept` to `kept_after` adds; eq. 16."""
    return eta * math.sqrt((1 - kept_after) / (1 - kept) * (1 - kept / kept_after))


def ddim_step(prediction: Prediction, kept_after: float, sigma: float = 0.0) -> Tensor:
    """The mean of x (B, ...) after a step that ends at a(t) = `kept_after` and will add noise of `sigma`; eq. 12."""
    towards_x = math.sqrt(max(1 - kept_after - sigma**2, 0.0))
    return math.sqrt(kept_after) * prediction.x0 + towards_x * prediction.eps


class DDIMSampler(Sampler):
    """Deterministic at eta 0, DDPM's posterior at eta 1 (with as many steps as the model was trained with)."""

    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, draw: NoiseSource) -> Step:
        """Eq. 12 on every position of the grid."""

        def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            prediction = denoise(x, grid.times[i])
            sigma = ddim_sigma(grid.kept[i], grid.kept_after[i], eta)
            mean = ddim_step(prediction, grid.kept_after[i], sigma)
            return (mean + sigma * draw() if sigma else mean), prediction.x0

        return step
