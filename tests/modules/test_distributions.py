"""The posterior of the first stage against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from ldm.modules.distributions.distributions import (
    DiagonalGaussianDistribution,
    DiracDistribution,
    normal_kl,
)


def parameters(seed: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(3, 8, 2, 5, generator=torch.Generator().manual_seed(seed))


def reference(values: torch.Tensor) -> Independent:
    mean, logvar = values[:, :4], values[:, 4:].clamp(-30, 20)
    return Independent(Normal(mean, (logvar / 2).exp()), 3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 5))
def test_moments_and_divergence(seed: int, spread: float) -> None:
    ours, theirs = DiagonalGaussianDistribution(parameters(seed, spread)), reference(parameters(seed, spread))
    assert torch.equal(ours.mode(), theirs.mode)
    assert torch.allclose(ours.std, theirs.stddev, rtol=1e-5)
    assert torch.allclose(ours.var, theirs.variance, rtol=1e-5)
    standard = Independent(Normal(torch.zeros(3, 4, 2, 5), 1.0), 3)
    assert torch.allclose(ours.kl(), kl_divergence(theirs, standard), rtol=1e-4)


def test_samples_have_the_right_moments_and_are_reproducible() -> None:
    values = parameters(0, 1.0)
    gaussian = DiagonalGaussianDistribution(values)
    samples = torch.stack([gaussian.sample(torch.Generator().manual_seed(seed)) for seed in range(2000)])
    assert torch.allclose(samples.mean(0), gaussian.mean, atol=5 * float(gaussian.std.max()) / 2000**0.5)
    assert torch.allclose(samples.std(0), gaussian.std, rtol=0.12)
    assert torch.equal(samples[5], gaussian.sample(torch.Generator().manual_seed(5)))
    torch.manual_seed(1)
    assert not torch.equal(gaussian.sample(), gaussian.sample())


def test_gradients_reach_both_halves() -> None:
    values = parameters(1).requires_grad_()
    DiagonalGaussianDistribution(values).sample().square().sum().backward()
    assert values.grad.ne(0).all()


def test_extreme_variances_are_clamped() -> None:
    values = torch.zeros(1, 2, 1, 2)
    values[:, 1] = torch.tensor([-1000.0, 1000.0])
    gaussian = DiagonalGaussianDistribution(values)
    assert gaussian.logvar.flatten().tolist() == [-30, 20]
    assert gaussian.kl().isfinite().all() and gaussian.sample().isfinite().all()


def test_deterministic_distributions_have_no_variance() -> None:
    gaussian = DiagonalGaussianDistribution(parameters(2), deterministic=True)
    assert torch.equal(gaussian.sample(), gaussian.mean)
    assert not gaussian.var.any() and not gaussian.kl().any()
    assert gaussian.kl().shape == (3,)


def test_half_precision_stays() -> None:
    assert DiagonalGaussianDistribution(parameters(3).half()).sample().dtype == torch.float16


def test_divergence_and_likelihood_of_two_gaussians() -> None:
    one, other = (DiagonalGaussianDistribution(parameters(seed, 1.0)) for seed in (3, 4))
    theirs = [reference(parameters(seed, 1.0)) for seed in (3, 4)]
    assert torch.allclose(one.kl(other), kl_divergence(*theirs), rtol=1e-4)
    sample = other.mode()
    assert torch.allclose(one.nll(sample), -theirs[0].log_prob(sample), rtol=1e-4)
    assert one.nll(sample, dims=[1]).shape == (3, 2, 5)
    fixed = DiagonalGaussianDistribution(parameters(3), deterministic=True)
    assert not fixed.nll(sample).any() and not fixed.kl(other).any()


def test_divergence_of_normal_distributions_broadcasts() -> None:
    mean = torch.tensor([0.0, 1.5])
    expected = kl_divergence(Normal(mean, 2.0), Normal(0.5, 3.0))
    assert torch.allclose(normal_kl(mean, 2 * math.log(2), 0.5, 2 * math.log(3)), expected)
    with pytest.raises(ValueError, match="tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


def test_samples_come_from_the_generator_of_the_cpu() -> None:
    """As in the family: a float32 sample on the CPU, whichever dtype or device the mean has."""
    gaussian = DiagonalGaussianDistribution(parameters(5).double())
    torch.manual_seed(2)
    noise = torch.randn(3, 4, 2, 5)
    torch.manual_seed(2)
    assert torch.equal(gaussian.sample(), gaussian.mean + gaussian.std * noise)


def test_a_single_value() -> None:
    value = torch.ones(2)
    assert DiracDistribution(value).sample() is value and DiracDistribution(value).mode() is value
