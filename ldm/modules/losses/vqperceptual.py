"""The loss of the public VQ first stages (Esser et al., CVPR 2021, section 3.1)."""
from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ldm.modules.losses.adversarial import AdversarialLoss, log_entries


def codebook_use(codes: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Measure how much of a codebook a batch uses.

    Args:
        codes: indices of any shape.
        n_embed: size of the codebook.

    Returns:
        The perplexity of the codes and the number of distinct codes, each at most `n_embed`.
    """
    frequencies = torch.bincount(codes.flatten(), minlength=n_embed).float() / codes.numel()
    return torch.special.entr(frequencies).sum().exp(), (frequencies > 0).sum().float()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """The mean distance, plus `codebook_weight` times the quantizer's loss, plus the adversarial losses.

    Args (in addition to those of `AdversarialLoss`):
        codebook_weight: weight of the quantizer's loss.
        n_classes: size of the codebook; if given, its use is logged.
        perceptual_loss: kept for the public configs; must be "lpips".
        pixel_loss: absolute ("l1") or squared ("l2") differences of pixels.
    """

    def __init__(self, disc_start: int, codebook_weight: float = 1.0, n_classes: int | None = None,
                 perceptual_loss: Literal["lpips"] = "lpips", pixel_loss: Literal["l1", "l2"] = "l1",
                 **adversarial: Any) -> None:
        super().__init__(disc_start, **adversarial)
        self.codebook_weight, self.n_classes = codebook_weight, n_classes
        self.squared = pixel_loss == "l2"

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        return (inputs - reconstructions).square() if self.squared else super().pixel_loss(inputs, reconstructions)

    def forward(self, inputs: Tensor, reconstructions: Tensor, codebook_loss: Tensor, codes: Tensor,
                split: str = "train", *, step: int, last_layer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of images (B, C, H, W) in [-1, 1].

        Returns:
            The sum of the autoencoder's and the discriminator's losses, and values to log.
        """
        distances, perceptual = self.distances(inputs, reconstructions)
        nll = distances.mean()
        generator_loss, discriminator_loss, log = self.adversarial(inputs, reconstructions, nll, step, last_layer)
        loss = nll + self.codebook_weight * codebook_loss.mean() + generator_loss
        log |= {"total_loss": loss, "quant_loss": codebook_loss, "nll_loss": nll, "rec_loss": distances,
                "p_loss": perceptual}
        if self.n_classes is not None:
            log["perplexity"], log["cluster_usage"] = codebook_use(codes, self.n_classes)
        return loss + discriminator_loss, log_entries(log, split)
