"""PLMS: Liu, Ren, Lin & Zhao 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", linear multistep.

As in latent diffusion, the first step is a pseudo improved Euler step in place of the paper's Runge-Kutta steps, so S
steps cost S + 1 evaluations of the model.
"""
from __future__ import annotations

import math
from collections import deque

from torch import Tensor

from ldm.errors import UserError
from ldm.models.diffusion.ddim import ddim_step
from ldm.models.diffusion.sampling import Denoiser, NoiseSource, Sampler, Step, TimeGrid
from ldm.models.diffusion.schedule import Prediction

# Adams-Bashforth by the number of noise estimates at hand, the newest first; order 4 is the paper's linear multistep.
# It takes the times as evenly spaced; where S does not divide the schedule, neighbours differ by one, which is below
# the error of the method itself at any usual S.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def extrapolated(newest_first: list[Tensor]) -> Tensor:
    """The noise estimate for a step from the last one to four estimates (B, ...), the newest first."""
    weights = ADAMS_BASHFORTH[len(newest_first) - 1]
    return sum(weight * eps for weight, eps in zip(weights, newest_first, strict=True))


def with_noise(x: Tensor, eps: Tensor, kept: float) -> Prediction:
    """`eps` and the image that it leaves of x (B, ...) at a(t) = `kept`."""
    return Prediction(eps, (x - math.sqrt(1 - kept) * eps) / math.sqrt(kept))


class PLMSSampler(Sampler):
    """Fewer steps than DDIM for the same quality, and deterministic: eta must be 0."""

    def check_eta(self, eta: float) -> None:
        """Raises a UserError unless `eta` is 0."""
        if eta != 0:
            raise UserError(f"PLMS adds no noise, so eta must be 0, not {eta}; take DDIM for noise")

    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, draw: NoiseSource) -> Step:
        """Steps that remember the noise estimates of up to three steps before."""
        estimates: deque[Tensor] = deque(maxlen=len(ADAMS_BASHFORTH))

        def improved_euler(x: Tensor, eps: Tensor) -> Tensor:
            ahead = ddim_step(with_noise(x, eps, grid.kept[0]), grid.kept_after[0])
            return (eps + denoise(ahead, grid.times[1]).eps) / 2

        def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            estimates.appendleft(denoise(x, grid.times[i]).eps)
            # a grid of one has no next time to look at and stays with plain Euler
            warm_up = i == 0 and len(grid) > 1
            eps = improved_euler(x, estimates[0]) if warm_up else extrapolated(list(estimates))
            prediction = with_noise(x, eps, grid.kept[i])
            return ddim_step(prediction, grid.kept_after[i]), prediction.x0

        return step
