"""The base class of the public first stages' losses: pixel and perceptual distances, and a patch discriminator.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (CVPR 2021), equations 5 to 7.

Autoencoder and discriminator are trained by one backward pass. The autoencoder's loss treats the discriminator as
constant, and the discriminator's loss treats the reconstructions as constant. So each parameter gets the gradient of
its own loss only.
"""
from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn
from torch.func import functional_call

from ldm.common.errors import UserError
from ldm.modules.losses.perceptual import LPIPS

MAX_ADAPTIVE_WEIGHT = 1e4


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss from its logits of images and of reconstructions (Lim & Ye, 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the discriminator's cross-entropy, the loss of the first GANs (Goodfellow et al., 2014)."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Compute the weight of the adversarial loss: the ratio of the norms of both losses' gradients.

    The gradients are those of the decoder's last layer. Source: Esser et al., equation 7, with the public code's 1e-4
    in the denominator and its upper bound of 10,000.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
             for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()


class AdversarialLoss(nn.Module):
    """Base class: distances between images and reconstructions, and a discriminator that tells them apart.

    Args:
        disc_start: number of optimizer steps before the adversarial losses start.
        pixelloss_weight: weight of the pixel distance.
        perceptual_weight: weight of the perceptual distance; if 0, its network is not loaded.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: architecture of the discriminator.
        disc_factor: factor of both adversarial losses.
        disc_weight: further factor of the autoencoder's adversarial loss, besides its adaptive weight.
        disc_conditional: kept for the public configs; must be false.
        disc_loss: "hinge" or "vanilla".
        perceptual_root: folder of the perceptual network's files; `load_perceptual` reads them when training starts.

    Raises:
        UserError: if `disc_conditional` is true.
    """

    perceptual_loss: LPIPS | None

    def __init__(self, disc_start: int, pixelloss_weight: float = 1.0, disc_num_layers: int = 3,
                 disc_in_channels: int = 3, disc_factor: float = 1.0, disc_weight: float = 1.0,
                 perceptual_weight: float = 1.0, use_actnorm: bool = False, disc_conditional: bool = False,
                 disc_ndf: int = 64, disc_loss: Literal["hinge", "vanilla"] = "hinge",
                 perceptual_root: str = "models/lpips") -> None:
        super().__init__()
        if disc_conditional:
            raise UserError("disc_conditional: first stages have no condition to give; set it to false")
        self.pixel_weight, self.perceptual_weight = pixelloss_weight, perceptual_weight
        self.perceptual_root, self.perceptual_loss = perceptual_root, None
        self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
        self.discriminator.apply(weights_init)
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.discriminator_iter_start = disc_start
        self.disc_loss = {"hinge": hinge_loss, "vanilla": vanilla_loss}[disc_loss]

    def load_perceptual(self) -> None:
        """Load the perceptual network if it is needed and not loaded yet. Call this before computing the loss.

        Raises:
            UserError: if its files are missing.
        """
        if self.perceptual_weight > 0 and self.perceptual_loss is None:
            self.perceptual_loss = LPIPS.from_folder(self.perceptual_root)

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """Compute the distance of each pixel, (B, C, H, W)."""
        return (inputs - reconstructions).abs()

    def distances(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the distances between images and reconstructions, (B, C, H, W) in [-1, 1].

        Returns:
            The weighted sum of both distances for each pixel, (B, C, H, W), and the perceptual distance, (B, 1, 1, 1).
        """
        pixels = self.pixel_weight * self.pixel_loss(inputs, reconstructions)
        if self.perceptual_weight <= 0:
            return pixels, pixels.new_zeros(len(pixels), 1, 1, 1)
        perceptual = self.perceptual_loss(inputs, reconstructions)
        return pixels + self.perceptual_weight * perceptual, perceptual

    def adversarial(self, inputs: Tensor, reconstructions: Tensor, nll: Tensor, step: int, last_layer: Tensor
                    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Compute both adversarial losses (Esser et al., equations 5 to 7).

        Args:
            inputs, reconstructions: images (B, C, H, W) in [-1, 1].
            nll: the reconstruction loss, which the adaptive weight refers to.
            step: number of optimizer steps so far.
            last_layer: weight of the decoder's last layer.

        Returns:
            The autoencoder's weighted loss, the discriminator's loss, and values to log.
        """
        factor = self.disc_factor if step >= self.discriminator_iter_start else 0.0

        # The autoencoder's loss: the discriminator should take reconstructions for images.
        generator_loss = -self._frozen_logits(reconstructions).mean()
        weight = nll.new_zeros(())
        if factor > 0 and torch.is_grad_enabled():  # without gradients, as in validation, the weight stays 0
            weight = self.discriminator_weight * adaptive_weight(nll, generator_loss, last_layer)

        # The discriminator's loss: it should tell reconstructions from images.
        real, fake = self.discriminator(inputs.detach()), self.discriminator(reconstructions.detach())
        discriminator_loss = factor * self.disc_loss(real, fake)

        log = {"d_weight": weight, "disc_factor": nll.new_tensor(factor), "g_loss": generator_loss,
               "disc_loss": discriminator_loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return weight * factor * generator_loss, discriminator_loss, log

    def _frozen_logits(self, images: Tensor) -> Tensor:
        """Compute the discriminator's logits; gradients reach the images, not its parameters."""
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, constants, (images,))


def log_entries(log: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Reduce values to their means and prefix their names with the split, such as "train/"."""
    return {f"{split}/{name}": value.detach().mean() for name, value in log.items()}
