"""DPM-Solver++ for the reverse SDE, single-step: the method that k-diffusion and user interfaces call DPM++ SDE.

The second-order form of Lu et al. 2022, "DPM-Solver++", for dx/dsigma with noise: a step first goes to its middle in
lambda, and then from its start to its end with the image that is predicted in the middle. Both parts add noise, from
one Brownian motion whose time is sigma, as in k-diffusion: the noise of the whole step contains that of its first half.
S steps cost 2 S - 1 evaluations of the model.
"""
from __future__ import annotations

from torch import Tensor

from ldm.modules.diffusionmodules.util import ddim_sigma
from ldm.sampling.sampler import Denoiser, NoiseSource, Sampler, Step, ddim_update
from ldm.sampling.schedule import PURE_NOISE, prediction_from_x0
from ldm.sampling.time_grid import SpacingRule, TimeGrid, karras_grid, with_midpoints


class SingleStepSDE(Sampler):
    """Adds noise in each step, on the noise levels of Karras et al.; eta is 1 by default."""

    label = "DPM-Solver++ SDE"
    default_eta = 1.0
    spacing_rule = SpacingRule(fractional=True)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return noise levels that are dense where little noise is left."""
        return karras_grid(self.model.alphas_cumprod, steps)

    def network_grid(self, grid: TimeGrid) -> TimeGrid:
        """Return the levels of the grid, then the middle of each step but the last."""
        return with_midpoints(grid, self.model.alphas_cumprod)

    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, sample_noise: NoiseSource) -> Step:
        """Return the step by way of its middle. The first step from pure noise and the last one have no middle."""
        levels = self.network_grid(grid)

        def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            start, following = grid.alpha_bar[i], grid.alpha_bar_next[i]
            prediction = denoise(x, i)
            noise = sample_noise() if eta else None
            if start > PURE_NOISE and i + 1 < len(grid):
                middle = len(grid) + i
                level = levels.alpha_bar[middle]
                half = ddim_update(prediction, level, float(ddim_sigma(start, level, eta)), lambda: noise)
                prediction = prediction_from_x0(x, denoise(half, middle).x0, start)
                if eta:
                    share = noise_share(start, level, following)
                    noise = share**0.5 * noise + (1 - share) ** 0.5 * sample_noise()
            sigma = float(ddim_sigma(start, following, eta))
            return ddim_update(prediction, following, sigma, lambda: noise), prediction.x0

        return step


def noise_share(start: float, middle: float, end: float) -> float:
    """Return the part of a step's way in sigma that its first half covers, from alpha_bar at three levels."""
    first, second, last = (((1 - level) / level) ** 0.5 for level in (start, middle, end))
    return (first - second) / (first - last)
