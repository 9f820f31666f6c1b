"""First stages: images to latents and back, under latent diffusion's names (Rombach et al., CVPR 2022, Sec. 3.1)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.load import load_weights
from ldm.models.first_stage import FirstStage, image_batch
from ldm.models.vq import VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface", "image_batch"]


class AutoencoderKL(FirstStage):
    """An autoencoder with a Gaussian latent: images (B, 3, H, W) in [-1, 1] to latents (B, embed_dim, H/f, W/f).

    Args (beside those of `FirstStage`):
        embed_dim: channels of the latent.
        ckpt_path, ignore_keys: weights to start from, without the keys that begin with one of these.
        train_encoder: False trains the decoder alone, so that models of the latents stay valid.
        latent_noise: in training, latents get noise of a deviation drawn from 0 to this: samples of a diffusion model
            are never exact, and such a decoder forgives it.
    """

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], embed_dim: int,
                 ckpt_path: str | None = None, ignore_keys: Sequence[str] = (), image_key: str = "image",
                 colorize_nlabels: int | None = None, monitor: str | None = None,
                 scheduler_config: Mapping[str, Any] | None = None, train_encoder: bool = True,
                 latent_noise: float = 0.0) -> None:
        super().__init__(ddconfig, lossconfig, double_z=True, image_key=image_key, monitor=monitor,
                         scheduler_config=scheduler_config, colorize_nlabels=colorize_nlabels)
        self.train_encoder, self.latent_noise = train_encoder, latent_noise
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        self.embed_dim = embed_dim
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys=ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        if self.training and self.latent_noise:
            z = z + self.latent_noise * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
        return self.decode(z), posterior

    def trained_parameters(self) -> list[nn.Parameter]:
        trained = [*self.decoder.parameters(), *self.post_quant_conv.parameters()]
        encoder = [*self.encoder.parameters(), *self.quant_conv.parameters()]
        for parameter in encoder:
            parameter.requires_grad_(self.train_encoder)
        return trained + (encoder if self.train_encoder else [])

    def shown(self, images: Tensor) -> Tensor:
        return self(images, sample_posterior=False)[0]


class IdentityFirstStage(nn.Module):
    """No first stage: diffusion on the pixels themselves."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x
