"""Euler's method, plain and ancestral, on the probability flow dx/dsigma = eps of images with noise x_0 + sigma eps.

Karras, Aittala, Aila & Laine 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 1; the
ancestral form as in k-diffusion. Seen from x_t, which is sqrt(a) times as large, a step of plain Euler is DDIM's with
eta 0, and one of ancestral Euler DDIM's with eta 1: what sets them apart is where the steps lie.
"""
from __future__ import annotations

from ldm.models.diffusion.sampling import Sampler
from ldm.models.diffusion.time_grid import TimeGrid, karras_grid, trailing_grid


class EulerSampler(Sampler):
    """Deterministic, on sigmas spaced after Karras et al."""

    label = "Euler"
    supports_eta = False

    def make_grid(self, steps: int) -> TimeGrid:
        """Sigmas dense where little noise is left."""
        return karras_grid(self.model.alphas_cumprod, steps)


class EulerAncestralSampler(Sampler):
    """Each step removes more noise than it has to and adds fresh noise; eta is 1 unless given."""

    label = "ancestral Euler"
    default_eta = 1.0

    def make_grid(self, steps: int) -> TimeGrid:
        """Evenly spaced times from pure noise on."""
        return trailing_grid(self.model.alphas_cumprod, steps)
