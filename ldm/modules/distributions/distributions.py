"""The Gaussian posterior of a KL autoencoder."""
from __future__ import annotations

import torch
from torch import Tensor

from ldm.util import to_device


class DiagonalGaussianDistribution:
    """A distribution of latents whose elements are independent: N(mean, exp(logvar)).

    Args:
        parameters: (B, 2z, h, w), the means, then the logarithms of the variances, which are clamped to [-30, 20].
        deterministic: whether the variance is zero, so that every sample is the mean.

    Source: Rombach et al., CVPR 2022, appendix G.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return self.std.square()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a random sample (B, z, h, w). A generator makes it reproducible."""
        device = generator.device if generator else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * to_device(noise, self.mean.device)

    def mode(self) -> Tensor:
        """Return the most likely latent (B, z, h, w), which is the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """Return KL(self || N(0, 1)), summed over each latent, (B,)."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)
