"""UniPC: Zhao, Bai, Rao, Zhou & Lu 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models", of order 2 with B_2(h), for predictions of x_0.

The predictor is DPM-Solver++(2M)'s. Before each further step, the corrector repeats the last one with what has become
known since: an exact step for x_0 on the parabola (after the first step: with the mean) through the predictions before,
at and after its start. It costs no further evaluation of the model, which has seen the uncorrected x.
"""
from __future__ import annotations

import math
from collections import deque

from torch import Tensor

from ldm.sampling.dpm_solver import extrapolation_weight
from ldm.sampling.sampler import Denoiser, Sampler
from ldm.sampling.schedule import Prediction, add_noise, prediction_from_x0
from ldm.sampling.time_grid import SpacingRule, TimeGrid, evenly_spaced_grid, half_log_snr


def corrector_weights(grid: TimeGrid, i: int) -> tuple[float, float]:
    """Return the weights of x_0 before and after step i, relative to that at its start, for the corrected step i.

    The step is a mean of x_0 over u in 0..1, its way in lambda, weighted by exp(h u). For x_0 on a parabola that is a
    combination of the means of u and u^2 (the paper's R_2 rho = b).
    """
    if i == 0:
        return 0.0, 0.5
    previous, current, following = (half_log_snr(level) for level in (*grid.alpha_bar[i - 1:i + 1],
                                                                      grid.alpha_bar_next[i]))
    h = following - current
    mean = -1 / math.expm1(-h) - 1 / h
    mean_square = -1 / math.expm1(-h) - 2 * mean / h
    ratio = (current - previous) / h
    weight = (mean - mean_square) / (1 + ratio)
    return -weight / ratio, mean - weight


class UniPC(Sampler):
    """Deterministic, on evenly spaced timesteps."""

    label = "UniPC"
    supports_eta = False
    spacing_rule = SpacingRule(intervals=True)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return evenly spaced timesteps from the schedule's noisy end."""
        return evenly_spaced_grid(self.model.alphas_cumprod, steps, "linspace", self.spacing_rule)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Correct the step before, then predict with x_0 extrapolated from this and the previous step."""
        known: deque[Tensor] = deque(maxlen=3)  # predictions of x_0
        corrected: list[Tensor] = []  # x at the start of the last step

        def predict(x: Tensor, i: int) -> Prediction:
            known.append(denoise(x, i).x0)
            if i > 0:
                before, after = corrector_weights(grid, i - 1)
                start = known[-2]
                x0 = start + before * (known[0] - start) + after * (known[-1] - start)
                x = add_noise(prediction_from_x0(corrected.pop(), x0, grid.alpha_bar[i - 1]), grid.alpha_bar[i])
            corrected.append(x)
            x0 = known[-1]
            if i > 0:
                x0 = x0 + extrapolation_weight(grid, i) * (x0 - known[-2])
            return prediction_from_x0(x, x0, grid.alpha_bar[i])

        return predict
