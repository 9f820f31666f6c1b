"""The reconstruction loss against its formula."""

from __future__ import annotations

import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.reconstruction import ReconstructionKL


def test_reconstruction_loss_against_the_formula() -> None:
    inputs = torch.rand(2, 3, 8, 8) * 2 - 1
    reconstructions = (inputs + 0.1).requires_grad_()
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 2, 2))
    loss, log = ReconstructionKL(kl_weight=0.5, l1_weight=0.25)(inputs, reconstructions, posterior, split="val")
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.var.log()).mean()
    assert torch.allclose(loss, 0.01 + 0.25 * 0.1 + 0.5 * kl, atol=1e-5)
    assert torch.allclose(log["val/psnr"], 20 * torch.tensor(2 / 0.1).log10(), atol=1e-3)
    assert torch.allclose(log["val/kl"], kl, atol=1e-5) and torch.equal(log["val/total_loss"], loss.detach())
    loss.backward()
    assert reconstructions.grad.gt(0).all() and not any(value.requires_grad for value in log.values())
