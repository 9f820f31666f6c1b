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
from ldm.sampling.time_grid import SpacingRule, TimeGrid, half_log_snr, karras_grid


def extrapolation_weight(grid: TimeGrid, i: int) -> float:
    """Return 1 / (2 r_i) with r_i = h_{i-1} / h_i, the step lengths in lambda.

    It is 0 for the first step, which has no earlier prediction, and for a step that leads to a clean image, where
    lambda is infinite.
    """
    if i == 0 or grid.alpha_bar_next[i] == 1:
        return 0.0
    levels = (grid.alpha_bar[i - 1], grid.alpha_bar[i], grid.alpha_bar_next[i])
    previous, current, following = (half_log_snr(level) for level in levels)
    return (following - current) / (current - previous) / 2


def multistep_predictor(denoise: Denoiser, grid: TimeGrid, lower_order_final: bool = False) -> Denoiser:
    """Return what predicts with x_0 extrapolated from this and the previous step.

    Args:
        denoise: predicts at the start of a step.
        lower_order_final: whether the last step is of first order wherever it leads, which is more stable if the steps
            are few.
    """
    history: deque[Tensor] = deque(maxlen=2)

    def predict(x: Tensor, i: int) -> Prediction:
        history.append(denoise(x, i).x0)
        first_order = lower_order_final and i + 1 == len(grid)
        # D_i = x_i + (x_i - x_{i-1}) / (2 r_i), Algorithm 2, line 9
        weight = 0.0 if first_order else extrapolation_weight(grid, i)
        x0 = history[-1] + weight * (history[-1] - history[0])
        return prediction_from_x0(x, x0, grid.alpha_bar[i])

    return predict


class DPMSolver(Sampler):
    """Deterministic, on the noise levels of Karras et al.; accurate from about 20 steps."""

    label = "DPM-Solver++"
    supports_eta = False
    spacing_rule = SpacingRule(intervals=True)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return noise levels that are dense where little noise is left, since the last step is of first order."""
        return karras_grid(self.model.alphas_cumprod, steps)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predict with x_0 extrapolated from this and the previous step."""
        return multistep_predictor(denoise, grid)


class DPMSolverSDE(DPMSolver):
    """The same for the reverse SDE: each step adds noise, as much as DDIM does at eta 1, which is the default.

    Source: the same paper, Sec. 6 ("SDE-DPM-Solver++(2M)").
    """

    label = "DPM-Solver++(2M) SDE"
    supports_eta = True
    default_eta = 1.0
