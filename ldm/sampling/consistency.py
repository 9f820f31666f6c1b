"""Samplers of consistency models, which map any x_t to an image at once and are sampled in a few steps.

    LCM    Luo, Tan, Huang, Li & Zhao 2023, "Latent Consistency Models", Algorithm 3
    TCD    Zheng, Hu, Fan, Wang, Ding, Tao & Cham 2024, "Trajectory Consistency Distillation", Algorithm 4

Both visit some of the 50 timesteps at which such models are distilled.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm.common.errors import UserError
from ldm.sampling.sampler import Denoiser, NoiseSource, Sampler, Step, noisy_step
from ldm.sampling.schedule import Prediction
from ldm.sampling.time_grid import TimeGrid, grid_at

DISTILLATION_STEPS = 50
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of the boundary condition, as in the LCM paper's code


def distillation_times(total: int, steps: int) -> list[int]:
    """Return `steps` of the timesteps of distillation on a schedule of `total` ones, the noisiest first.

    Raises:
        UserError: if there are not so many.
    """
    most = min(DISTILLATION_STEPS, total)
    if not 1 <= steps <= most:
        raise UserError(f"{steps} sampling steps: consistency models take 1 to {most}")
    noisiest_first = np.arange(most, 0, -1) * (total // most) - 1
    return noisiest_first[np.arange(steps) * most // steps].tolist()


def boundary_scalings(time: float) -> tuple[float, float]:
    """Return c_skip and c_out, the shares of x_t and of the predicted x_0 in a consistency model's output (Eq. 9)."""
    scaled = time * TIMESTEP_SCALING
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm**0.5


class ConsistencySampler(Sampler):
    """Visits timesteps of distillation."""

    spacings = ()
    max_steps = DISTILLATION_STEPS

    def make_grid(self, steps: int) -> TimeGrid:
        """Return timesteps of distillation."""
        schedule = self.model.alphas_cumprod
        return grid_at(schedule, distillation_times(len(schedule), steps), self.last_level(schedule))

    def last_level(self, schedule: Tensor) -> float:
        """Return the alpha_bar that the last step leads to: that of a clean image."""
        return 1.0


class LCM(ConsistencySampler):
    """Each step predicts the image and, except for the last one, adds new noise to it; at eta 0 it keeps the old."""

    label = "LCM"
    default_eta = 1.0

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predict with the output of the consistency function in place of x_0."""

        def predict(x: Tensor, i: int) -> Prediction:
            prediction = denoise(x, i)
            c_skip, c_out = boundary_scalings(grid.times[i])
            return prediction._replace(x0=c_out * prediction.x0 + c_skip * x)

        return predict

    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, sample_noise: NoiseSource) -> Step:
        """Return the step whose noise is, at eta 1, all of the next level's."""
        sigmas = [eta * (1 - level) ** 0.5 for level in grid.alpha_bar_next]
        return noisy_step(self.make_predictor(denoise, grid), grid, sigmas, sample_noise)


class TCD(ConsistencySampler):
    """Each step goes down to timestep (1 - eta) t of the next one's t and adds noise up to t; eta is the paper's gamma.

    It is 0.3 by default; Hyper-SD recommends 0.3 to 1, the lower the more steps there are.
    """

    label = "TCD"
    default_eta = 0.3

    def last_level(self, schedule: Tensor) -> float:
        """Return the alpha_bar of the schedule's first timestep."""
        return float(schedule[0].double())

    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, sample_noise: NoiseSource) -> Step:
        """Return the step by way of a lower noise level."""
        return noisy_step(denoise, grid, self._sigmas(grid, eta), sample_noise)

    def _sigmas(self, grid: TimeGrid, eta: float) -> Sequence[float]:
        """Return the noise of each step: none in the last one."""
        lower = self.model.alphas_cumprod.double()[[int((1 - eta) * time) for time in grid.times[1:]]].tolist()
        levels = zip(grid.alpha_bar_next[:-1], lower, strict=True)
        return [*((1 - level / low) ** 0.5 for level, low in levels), 0.0]
