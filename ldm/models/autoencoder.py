"""First stages: images to latents and back, under latent diffusion's names (Rombach et al., CVPR 2022, Sec. 3.1)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.load import load_weights
from ldm.models.first_stage import FirstStage, image_batch
from ldm.models.initial_weights import LoadsInitialWeights
from ldm.models.vq import VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface", "image_batch"]


class AutoencoderKL(LoadsInitialWeights, FirstStage):
    """An autoencoder with a Gaussian latent: images (B, 3, H, W) in [-1, 1] to latents (B, embed_dim, H/f, W/f).

    Args (in addition to those of `FirstStage`):
        embed_dim: channels of the latent.
        ckpt_path, ignore_keys: initial weights, without the keys that begin with one of `ignore_keys`.
        train_encoder: if False, only the decoder is trained, so that diffusion models of the latents stay valid.
        latent_noise: in training, latents get noise whose standard deviation is uniform in [0, latent_noise]. Samples
            of a diffusion model are never exact; a decoder trained so tolerates it.
        ema_decay: keep an exponential moving average of the weights with this decay; None: none.
        learn_logvar: train the log-variance of the loss, `loss.logvar`.
    """

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], embed_dim: int,
                 ckpt_path: str | None = None, ignore_keys: Sequence[str] = (), image_key: str = "image",
                 colorize_nlabels: int | None = None, monitor: str | None = None,
                 scheduler_config: Mapping[str, Any] | None = None, train_encoder: bool = True,
                 latent_noise: float = 0.0, ema_decay: float | None = None, learn_logvar: bool = False) -> None:
        super().__init__(ddconfig, lossconfig, double_z=True, image_key=image_key, monitor=monitor,
                         scheduler_config=scheduler_config, colorize_nlabels=colorize_nlabels)
        self.train_encoder = train_encoder
        self.latent_noise = latent_noise
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        self.embed_dim = embed_dim
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.loss.logvar.requires_grad_(True)
        self.keep_averages(ema_decay is not None, ema_decay or 0.0)
        self.set_initial_weights(ckpt_path, ignore_keys=ignore_keys)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
        self.restart_averages(load_weights(self, path, ignore_keys, self.optional_keys()))

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior of the latents (B, embed_dim, H/f, W/f) of images."""
        # contiguous, so that noise like the latents has this order
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)).contiguous())

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of latents."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return the reconstructions of images, and the posterior of their latents."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        if self.training and self.latent_noise:
            std = self.latent_noise * torch.rand(len(z), 1, 1, 1, device=z.device)
            z = z + std * torch.randn_like(z)
        return self.decode(z), posterior

    def trained_parameters(self) -> list[nn.Parameter]:
        decoder = [*self.decoder.parameters(), *self.post_quant_conv.parameters()]
        encoder = [*self.encoder.parameters(), *self.quant_conv.parameters()]
        for parameter in encoder:
            parameter.requires_grad_(self.train_encoder)
        logvar = [self.loss.logvar] if self.learn_logvar else []
        return decoder + (encoder if self.train_encoder else []) + logvar

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], only_inputs: bool = False, log_ema: bool = False,
                   N: int | None = None, **_: Any) -> dict[str, Tensor]:
        """Return inputs, their reconstructions, and the images of random latents as samples.

        With averages, or `log_ema`, the same follow with the averaged weights.
        """
        images = self.logged_inputs(batch, N)
        if only_inputs:
            return {"inputs": self.to_rgb(images)}
        shown = {**self._reconstruct_and_sample(images), "inputs": self.to_rgb(images)}
        if log_ema or self.use_ema:
            with self.ema_scope():
                shown |= {f"{name}_ema": value for name, value in self._reconstruct_and_sample(images).items()}
        return shown

    def _reconstruct_and_sample(self, images: Tensor) -> dict[str, Tensor]:
        reconstructions, posterior = self(images)
        samples = self.decode(torch.randn_like(posterior.sample()))
        return {"samples": self.to_rgb(samples), "reconstructions": self.to_rgb(reconstructions)}


class IdentityFirstStage(nn.Module):
    """No first stage: diffusion on the pixels themselves.

    Args:
        vq_interface: whether `quantize` returns what that of a `VQModel` does.
        args, kwargs: ignored, so that the params of any first stage fit.
    """

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
