"""DDIM: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models"; the update is `ddim_update` in sampler.py."""
from __future__ import annotations

from ldm.sampling.sampler import Sampler
from ldm.sampling.time_grid import SpacingRule, TimeGrid, leading_grid


class DDIM(Sampler):
    """Deterministic at eta 0, DDPM's posterior at eta 1 (with as many steps as the model was trained with)."""

    label = "DDIM"
    spacing_rule = SpacingRule(ends_clean=False)

    def make_grid(self, steps: int) -> TimeGrid:
        """Return the timesteps of latent diffusion's DDIM."""
        return leading_grid(self.model.alphas_cumprod, steps)
