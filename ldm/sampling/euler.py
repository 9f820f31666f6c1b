"""Euler's method, plain and ancestral, on the probability flow dx/dsigma = eps of images with noise x_0 + sigma eps.

Karras, Aittala, Aila & Laine 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", Eq. 1; the
ancestral form as in k-diffusion. In terms of x_t, which is sqrt(alpha_bar) times as large, a step of plain Euler is a
step of DDIM with eta 0, and a step of ancestral Euler one with eta 1. What differs is the spacing of the steps.
"""
from __future__ import annotations

from ldm.sampling.sampler import Sampler
from ldm.sampling.time_grid import SpacingRule, TimeGrid, karras_grid, trailing_grid


class Euler(Sampler):
    """Deterministic, on the noise levels of Karras et al."""

    label = "Euler"
    supports_eta = False
    spacing_rule = SpacingRule(fractional=True)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return noise levels that are dense where little noise is left."""
        return karras_grid(self.model.alphas_cumprod, steps)


class EulerAncestral(Sampler):
    """Each step removes more noise than necessary and adds fresh noise; eta is 1 by default."""

    label = "ancestral Euler"
    default_eta = 1.0
    spacing_rule = SpacingRule(fractional=True)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return evenly spaced timesteps that start at pure noise."""
        return trailing_grid(self.model.alphas_cumprod, steps)
