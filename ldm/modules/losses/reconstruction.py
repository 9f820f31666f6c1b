"""A reconstruction loss without a discriminator, for autoencoders that are too small to profit from one."""
from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class ReconstructionKL(nn.Module):
    """The mean squared error, plus the mean absolute error, plus the KL divergence per latent element.

    Args:
        kl_weight: weight of the KL divergence.
        l1_weight: weight of the absolute error.
    """

    def __init__(self, kl_weight: float = 1e-4, l1_weight: float = 0.1) -> None:
        super().__init__()
        self.kl_weight, self.l1_weight = kl_weight, l1_weight

    def forward(self, inputs: Tensor, reconstructions: Tensor, posterior: DiagonalGaussianDistribution,
                split: str = "train") -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of images (B, C, H, W) in [-1, 1].

        Returns:
            The loss, and values to log.
        """
        difference = inputs - reconstructions
        mse = difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = mse + self.l1_weight * difference.abs().mean() + self.kl_weight * kl
        psnr = 10 * (4.0 / mse.detach()).log10()  # in dB, for pixels with a range of 2
        return loss, {f"{split}/psnr": psnr, f"{split}/kl": kl.detach(), f"{split}/total_loss": loss.detach()}
