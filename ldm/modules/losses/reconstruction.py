"""A reconstruction loss without a discriminator, for autoencoders too small for one to help."""
from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class ReconstructionKL(nn.Module):
    """Mean squared error plus `l1_weight` times the absolute error plus `kl_weight` times the KL per latent element."""

    def __init__(self, kl_weight: float = 1e-4, l1_weight: float = 0.1) -> None:
        super().__init__()
        self.kl_weight, self.l1_weight = kl_weight, l1_weight

    def forward(self, inputs: Tensor, reconstructions: Tensor, posterior: DiagonalGaussianDistribution,
                split: str = "train") -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, C, H, W) in [-1, 1] to (loss, numbers to log); PSNR is for a range of 2."""
        difference = inputs - reconstructions
        mse = difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = mse + self.l1_weight * difference.abs().mean() + self.kl_weight * kl
        psnr = 10 * (4.0 / mse.detach()).log10()
        return loss, {f"{split}/psnr": psnr, f"{split}/kl": kl.detach(), f"{split}/total_loss": loss.detach()}
