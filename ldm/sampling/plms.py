"""PLMS: Liu, Ren, Lin & Zhao 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", linear multistep.

As in latent diffusion, the first step is a pseudo improved Euler step in place of the paper's Runge-Kutta steps, so S
steps cost S + 1 evaluations of the model.
"""
from __future__ import annotations

from collections import deque

from torch import Tensor

from ldm.sampling.heun import average_eps
from ldm.sampling.sampler import Denoiser, Sampler
from ldm.sampling.schedule import PURE_NOISE, Prediction, prediction_from_eps
from ldm.sampling.time_grid import SpacingRule, TimeGrid, leading_grid

# Adams-Bashforth weights by the number of available estimates of eps, the newest first; order 4 is Eq. 12 of the paper.
# The method assumes evenly spaced timesteps. If S does not divide the schedule, intervals differ by one timestep, which
# is below the error of the method itself for any common S.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def multistep_eps(newest_first: list[Tensor]) -> Tensor:
    """Combine the last one to four estimates of eps (B, ...), the newest first, into the eps of the next step."""
    weights = ADAMS_BASHFORTH[len(newest_first) - 1]
    return sum(weight * eps for weight, eps in zip(weights, newest_first, strict=True))


class PLMS(Sampler):
    """Deterministic; needs fewer steps than DDIM for the same quality."""

    label = "PLMS"
    supports_eta = False
    spacings = ("leading", "trailing", "linspace")  # it extrapolates over even timesteps
    spacing_rule = SpacingRule(ends_clean=False)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return the timesteps of latent diffusion's DDIM."""
        return leading_grid(self.model.alphas_cumprod, steps)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predict with the estimates of eps from this and up to three earlier steps."""
        estimates: deque[Tensor] = deque(maxlen=len(ADAMS_BASHFORTH))

        def predict(x: Tensor, i: int) -> Prediction:
            start = denoise(x, i)
            estimates.appendleft(start.eps)
            # The first step has no history and looks ahead instead. A grid of one step has no next timestep to look at
            # and takes DDIM's step, and so does a start at pure noise, where eps says nothing about the image.
            warm_up = i == 0 and len(grid) > 1
            if grid.alpha_bar[i] < PURE_NOISE:
                return start
            eps = average_eps(denoise, grid, start, i) if warm_up else multistep_eps(list(estimates))
            return prediction_from_eps(x, eps, grid.alpha_bar[i])

        return predict
