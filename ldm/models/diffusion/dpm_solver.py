"""DPM-Solver++(2M): Lu, Zhou, Bao, Chen, Li & Zhu 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models", algorithm 2.

The exact solution of the flow over a step is DDIM's step with a weighted mean of the guesses of the image along it.
The method takes for that mean the line through this guess and the last one, at the middle of the step in lambda.
"""
from __future__ import annotations

from collections import deque

from torch import Tensor

from ldm.models.diffusion.sampling import Denoiser, Sampler
from ldm.models.diffusion.schedule import Prediction, prediction_from_x0
from ldm.models.diffusion.time_grid import TimeGrid, karras_grid


def extrapolation_weight(grid: TimeGrid, i: int) -> float:
    """1 / (2 r_i): the middle of step i, counted from its start in lengths of the step before; 0 at both ends.

    The first step has none before it, and the last one leads to a clean image, where lambda is infinite.
    """
    if not 0 < i < len(grid) - 1:
        return 0.0
    before, here, after = (grid.half_log_snr(place) for place in (i - 1, i, i + 1))
    return (after - here) / (here - before) / 2


class DPMSolverSampler(Sampler):
    """Deterministic, on sigmas spaced after Karras et al.; near to the flow from some 20 steps on."""

    label = "DPM-Solver++"
    supports_eta = False

    def make_grid(self, steps: int) -> TimeGrid:
        """Sigmas dense where little noise is left, as the last step is of first order only."""
        return karras_grid(self.model.alphas_cumprod, steps)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predictions that remember the last guess of the image."""
        guesses: deque[Tensor] = deque(maxlen=2)

        def predict(x: Tensor, i: int) -> Prediction:
            guesses.append(denoise(x, i).x0)
            drift = guesses[-1] - guesses[0]
            return prediction_from_x0(x, guesses[-1] + extrapolation_weight(grid, i) * drift, grid.alpha_bar[i])

        return predict
