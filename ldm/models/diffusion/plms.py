"""PLMS: Liu, Ren, Lin & Zhao 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", linear multistep.

As in latent diffusion, the first step is a pseudo improved Euler step in place of the paper's Runge-Kutta steps, so S
steps cost S + 1 evaluations of the model.
"""
from __future__ import annotations

from collections import deque

from torch import Tensor

from ldm.models.diffusion.heun import average_eps
from ldm.models.diffusion.sampling import Denoiser, Sampler
from ldm.models.diffusion.schedule import Prediction, prediction_from_eps
from ldm.models.diffusion.time_grid import TimeGrid, leading_grid

# Adams-Bashforth by the number of noise estimates at hand, the newest first; order 4 is the paper's linear multistep.
# It takes the times as evenly spaced; where S does not divide the schedule, neighbours differ by one, which is below
# the error of the method itself at any usual S.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def multistep_eps(newest_first: list[Tensor]) -> Tensor:
    """The noise estimate for a step from the last one to four estimates (B, ...), the newest first."""
    weights = ADAMS_BASHFORTH[len(newest_first) - 1]
    return sum(weight * eps for weight, eps in zip(weights, newest_first, strict=True))


class PLMSSampler(Sampler):
    """Fewer steps than DDIM for the same quality, and deterministic."""

    label = "PLMS"
    supports_eta = False

    def make_grid(self, steps: int) -> TimeGrid:
        """The times of latent diffusion's DDIM."""
        return leading_grid(self.model.alphas_cumprod, steps)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predictions that remember the noise estimates of up to three steps before."""
        estimates: deque[Tensor] = deque(maxlen=len(ADAMS_BASHFORTH))

        def predict(x: Tensor, i: int) -> Prediction:
            here = denoise(x, i)
            estimates.appendleft(here.eps)
            # a grid of one has no next time to look at and stays with DDIM's step
            warm_up = i == 0 and len(grid) > 1
            eps = average_eps(denoise, grid, here, i) if warm_up else multistep_eps(list(estimates))
            return prediction_from_eps(x, eps, grid.alpha_bar[i])

        return predict
