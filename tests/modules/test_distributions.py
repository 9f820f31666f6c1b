"""The posterior of the first stage against torch.distributions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


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
