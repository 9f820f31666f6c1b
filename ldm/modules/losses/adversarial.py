"""What the losses of the public first stages share: pixels, a perceptual network and a discriminator of patches.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (CVPR 2021), equations 5 to 7. Autoencoder and
discriminator learn from one backward pass: in the autoencoder's term the discriminator is held constant, in the
discriminator's the reconstructions are, so that each parameter gets the gradient of its own term alone.
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

MOST_WEIGHT = 1e4


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on its answers to pictures and to reconstructions (Lim & Ye, 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """The same as the cross-entropy of the first GANs (Goodfellow et al., 2014)."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much the adversarial loss counts for, by the gradients that both losses give the decoder's last layer.

    Esser et al., equation 7, with the public code's 1e-4 in the denominator, and at most 10,000.
    """
    lengths = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
               for loss in (reconstruction, adversarial)]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(max=MOST_WEIGHT).detach()


class AdversarialLoss(nn.Module):
    """Distances of reconstructions to pictures, and a discriminator that tells the two apart.

    Args:
        disc_start: optimiser steps before the discriminator joins in.
        pixelloss_weight, perceptual_weight: of the two distances; at 0 the perceptual network is not needed.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: shape of the discriminator.
        disc_factor, disc_weight: of both adversarial terms, and of the autoencoder's on top of its adaptive weight.
        disc_conditional: kept for the public configs; must be false.
        disc_loss: "hinge" or "vanilla".
        perceptual_root: folder of the perceptual network's files, read when training starts (`load_perceptual`).
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
        self.disc_loss = {"hinge": hinge, "vanilla": vanilla}[disc_loss]

    def load_perceptual(self) -> None:
        """Reads the perceptual network where it is needed and not there yet; call this before the loss.

        Raises:
            UserError: its files are missing.
        """
        if self.perceptual_weight > 0 and self.perceptual_loss is None:
            self.perceptual_loss = LPIPS.from_folder(self.perceptual_root)

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """(B, C, H, W) distances of pixels."""
        return (inputs - reconstructions).abs()

    def distances(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Both distances together for every pixel, (B, C, H, W), and the perceptual one by itself, (B, 1, 1, 1)."""
        pixels = self.pixel_weight * self.pixel_loss(inputs, reconstructions)
        if self.perceptual_weight <= 0:
            return pixels, pixels.new_zeros(len(pixels), 1, 1, 1)
        perceptual = self.perceptual_loss(inputs, reconstructions)
        return pixels + self.perceptual_weight * perceptual, perceptual

    def adversarial(self, inputs: Tensor, reconstructions: Tensor, nll: Tensor, step: int, last_layer: Tensor
                    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The autoencoder's term, the discriminator's, and numbers to log.

        Args:
            nll: the loss of reconstruction, against which the autoencoder's term is weighed.
            step: optimiser steps done so far.
            last_layer: the decoder's last weight.
        """
        factor = self.disc_factor if step >= self.discriminator_iter_start else 0.0
        fooling = -self._constant(reconstructions).mean()
        weight = nll.new_zeros(())
        if factor > 0 and torch.is_grad_enabled():  # without gradients, as in validation, there is no such weight
            weight = self.discriminator_weight * adaptive_weight(nll, fooling, last_layer)
        real, fake = self.discriminator(inputs.detach()), self.discriminator(reconstructions.detach())
        telling = factor * self.disc_loss(real, fake)
        log = {"d_weight": weight, "disc_factor": nll.new_tensor(factor), "g_loss": fooling, "disc_loss": telling,
               "logits_real": real.mean(), "logits_fake": fake.mean()}
        return weight * factor * fooling, telling, log

    def _constant(self, images: Tensor) -> Tensor:
        """The discriminator's answers, of which its own parameters take no gradient."""
        held = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, held, (images,))


def named(log: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Numbers to log, of one element each, under the name of their split."""
    return {f"{split}/{name}": value.detach().mean() for name, value in log.items()}
