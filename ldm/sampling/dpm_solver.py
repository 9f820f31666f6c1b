"""DPM-Solver++(2M): Lu, Zhou, Bao, Chen, Li & Zhu 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models", Algorithm 2.

The exact solution of the flow over a step is DDIM's step with a weighted mean of the predicted x_0 along the step. The
method approximates that mean by the line through the last two predictions of x_0, at the middle of the step in lambda.
"""
from __future__ import annotations

from collections import deque

from torch import Tensor

from ldm.sampling.sampler import Denoiser, Sampler
from ldm.sampling.schedule import Prediction, prediction_from_x0
from ldm.sampling.time_grid import TimeGrid, karras_grid


def extrapolation_weight(grid: TimeGrid, i: int) -> float:
    """Return 1 / (2 r_i) with r_i = h_{i-1} / h_i, the step lengths in lambda; 0 for the first and the last step.

    The first step has no earlier prediction. The last one leads to a clean image, where lambda is infinite.
    """
    if not 0 < i < len(grid) - 1:
        return 0.0
    previous, current, following = (grid.half_log_snr(index) for index in (i - 1, i, i + 1))
    return (following - current) / (current - previous) / 2


class DPMSolver(Sampler):
    """Deterministic, on the noise levels of Karras et al.; accurate from about 20 steps."""

    label = "DPM-Solver++"
    supports_eta = False

    def make_grid(self, steps: int) -> TimeGrid:
        """Return noise levels that are dense where little noise is left, since the last step is of first order."""
        return karras_grid(self.model.alphas_cumprod, steps)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predict with x_0 extrapolated from this and the previous step."""
        history: deque[Tensor] = deque(maxlen=2)

        def predict(x: Tensor, i: int) -> Prediction:
            history.append(denoise(x, i).x0)
            # D_i = x_i + (x_i - x_{i-1}) / (2 r_i), Algorithm 2, line 9
            change = history[-1] - history[0]
            x0 = history[-1] + extrapolation_weight(grid, i) * change
            return prediction_from_x0(x, x0, grid.alpha_bar[i])

        return predict
