"""The loss of the public KL first stages (Rombach et al., CVPR 2022, appendix G)."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, log_entries


class DummyLoss(nn.Identity):
    """No loss, for first stages that are not trained."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """The sum of distances over each image, plus `kl_weight` times the KL of its latent, plus the adversarial losses.

    Args (in addition to those of `AdversarialLoss`):
        logvar_init: logarithm of the variance of the distances. The public code never optimized it, so it is a
            constant, stored as `logvar`.
        kl_weight: weight of the KL divergence, which is summed over each latent.
    """

    def __init__(self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, **adversarial: Any) -> None:
        super().__init__(disc_start, **adversarial)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=False)

    def forward(self, inputs: Tensor, reconstructions: Tensor, posterior: DiagonalGaussianDistribution,
                split: str = "train", *, step: int, last_layer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of images (B, C, H, W) in [-1, 1].

        Returns:
            The sum of the autoencoder's and the discriminator's losses, and values to log.
        """
        distances, _ = self.distances(inputs, reconstructions)
        nll = (distances / self.logvar.exp() + self.logvar).sum() / len(inputs)
        kl = posterior.kl().mean()
        generator_loss, discriminator_loss, log = self.adversarial(inputs, reconstructions, nll, step, last_layer)
        loss = nll + self.kl_weight * kl + generator_loss
        log |= {"total_loss": loss, "logvar": self.logvar, "kl_loss": kl, "nll_loss": nll, "rec_loss": distances}
        return loss + discriminator_loss, log_entries(log, split)
