"""The Gaussian that a KL autoencoder's encoder describes."""
from __future__ import annotations

import torch
from torch import Tensor

from ldm.util import to_device


class DiagonalGaussianDistribution:
    """N(mean, exp(logvar)) for every element of a latent.

    Args:
        parameters: (B, 2z, h, w), the means followed by the logarithms of the variances (clamped to [-30, 20]).
        deterministic: samples are the mean, and the variance counts as zero.
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
        """One draw, (B, z, h, w); a generator makes it repeatable."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device if generator else
                            self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * to_device(noise, self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(self || N(0, 1)) summed over each latent, (B,)."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)
