"""The Gaussian posterior of a KL autoencoder, and the family's other distributions."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.util import to_device


class AbstractDistribution:
    """What can be sampled and has a most likely value."""

    def sample(self) -> Tensor:
        """Return a random value."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """Return the most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """A distribution of a single value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value


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
        """Return a random sample (B, z, h, w).

        Its noise comes from `generator`, on the generator's device and in the dtype of the mean; by default from the
        global generator of the CPU in float32, as in latent diffusion, so that all devices give the same sample.
        """
        if generator is None:
            noise = torch.randn(self.mean.shape).to(self.mean.dtype)
        else:
            noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.mean + self.std * to_device(noise, self.mean.device)

    def mode(self) -> Tensor:
        """Return the most likely latent (B, z, h, w), which is the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return KL(self || other), summed over each latent, (B,); without `other`, KL(self || N(0, 1))."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        if other is not None:
            return normal_kl(self.mean, self.logvar, other.mean, other.logvar).flatten(1).sum(1)
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return the negative log-likelihood of `sample` (B, z, h, w), summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        distance = (sample - self.mean).square() / self.var
        return 0.5 * (math.log(2 * math.pi) + self.logvar + distance).sum(dim=list(dims))


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Return KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise; shapes broadcast.

    Raises:
        ValueError: if none of the arguments is a tensor.
    """
    given = (mean1, logvar1, mean2, logvar2)
    example = next((value for value in given if isinstance(value, Tensor)), None)
    if example is None:
        raise ValueError("normal_kl: one of the means and log-variances must be a tensor")
    mean1, logvar1, mean2, logvar2 = (torch.as_tensor(value).to(example) for value in given)
    distance = (mean1 - mean2).square() * (-logvar2).exp()
    return 0.5 * (logvar2 - logvar1 - 1.0 + (logvar1 - logvar2).exp() + distance)
