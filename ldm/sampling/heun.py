"""Heun's method of second order: Karras et al. 2022, Algorithm 1 without its churn (see `ldm.sampling.euler`).

A step averages the directions at its start and at the point where Euler's method would lead. The last step, which leads
to a clean image, stays with Euler, so S steps cost 2 S - 1 evaluations of the model.
"""
from __future__ import annotations

from torch import Tensor

from ldm.sampling.sampler import Denoiser, Sampler
from ldm.sampling.schedule import PURE_NOISE, Prediction, add_noise, prediction_from_eps
from ldm.sampling.time_grid import SpacingRule, TimeGrid, karras_grid


def average_eps(denoise: Denoiser, grid: TimeGrid, start: Prediction, i: int) -> Tensor:
    """Return the mean of eps (B, ...) at both ends of step i. Not for the last step of the grid.

    Args:
        start: the prediction at the start of the step.
    """
    # Euler step to the end of the interval (Algorithm 1, line 7), then the direction there (line 9)
    end = denoise(add_noise(start, grid.alpha_bar_next[i]), i + 1)
    return (start.eps + end.eps) / 2


class Heun(Sampler):
    """Deterministic, on the noise levels of Karras et al.; more accurate than Euler, at twice the cost per step."""

    label = "Heun"
    supports_eta = False
    spacing_rule = SpacingRule(fractional=True)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return noise levels that are dense where little noise is left."""
        return karras_grid(self.model.alphas_cumprod, steps)

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Predict with the mean of eps at both ends of a step."""

        def predict(x: Tensor, i: int) -> Prediction:
            start = denoise(x, i)
            # Euler's step to a clean image, and from pure noise, where eps says nothing about the image
            if i + 1 == len(grid) or grid.alpha_bar[i] < PURE_NOISE:
                return start
            # trapezoidal rule (Algorithm 1, line 10)
            return prediction_from_eps(x, average_eps(denoise, grid, start, i), grid.alpha_bar[i])

        return predict
