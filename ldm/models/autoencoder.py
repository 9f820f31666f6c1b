"""First stages: images to latents and back, under latent diffusion's names (Rombach et al., CVPR 2022, Sec. 3.1)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_weights
from ldm.errors import UserError
from ldm.models.optimisation import OneStepModule, optimizer_and_schedule
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config, refuse_unknown_params

DECODER_ONLY = ("give_pre_end", "tanh_out")


def image_batch(batch: Mapping[str, Tensor], key: str) -> Tensor:
    """`batch[key]` as float32 (B, C, H, W): the LDM family's datasets give (B, H, W, C), ours channels first."""
    images = batch[key]
    if images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.movedim(-1, 1)
    return images.float().contiguous(memory_format=torch.channels_last)


class AutoencoderKL(OneStepModule):
    """An autoencoder with a Gaussian latent: images (B, 3, H, W) in [-1, 1] to latents (B, embed_dim, H/f, W/f).

    Args:
        ddconfig: constructor params of `Decoder`, all but two of which are the `Encoder`'s too.
        lossconfig: config of a module called as (images, reconstructions, posterior, split) -> (loss, log).
        embed_dim: channels of the latent.
        ckpt_path, ignore_keys: weights to start from, without the keys that begin with one of these.
        image_key: where a batch keeps its images.
        monitor: the logged number by which checkpoints are ranked.
        scheduler_config: config of a learning-rate multiplier.
        train_encoder: False trains the decoder alone, so that models of the latents stay valid.
    """

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], embed_dim: int,
                 ckpt_path: str | None = None, ignore_keys: Sequence[str] = (), image_key: str = "image",
                 monitor: str | None = None, scheduler_config: Mapping[str, Any] | None = None,
                 train_encoder: bool = True) -> None:
        super().__init__()
        self.image_key, self.monitor, self.scheduler_config = image_key, monitor, scheduler_config
        self.train_encoder = train_encoder
        refuse_unknown_params("ddconfig", Decoder, ddconfig)
        if not ddconfig.get("double_z", True):
            raise UserError("ddconfig: AutoencoderKL needs a mean and a log-variance; set double_z: true")
        self.encoder = Encoder(**{key: value for key, value in ddconfig.items() if key not in DECODER_ONLY})
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        self.embed_dim = embed_dim
        self.learning_rate = 4.5e-6
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys=ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def step(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        images = image_batch(batch, self.image_key)
        reconstructions, posterior = self(images)
        loss, log = self.loss(images, reconstructions, posterior, split=split)
        self.log_dict(log, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [*self.decoder.parameters(), *self.post_quant_conv.parameters()]
        encoder = [*self.encoder.parameters(), *self.quant_conv.parameters()]
        for parameter in encoder:
            parameter.requires_grad_(self.train_encoder)
        trained += encoder if self.train_encoder else []
        return optimizer_and_schedule(torch.optim.Adam(trained, lr=self.learning_rate, betas=(0.5, 0.9)),
                                      self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], N: int = 8, **_: Any) -> dict[str, Tensor]:
        """The inputs and what comes back of them, for the log folder."""
        images = image_batch(batch, self.image_key)[:N].to(self.device)
        return {"inputs": images, "reconstructions": self(images, sample_posterior=False)[0]}


class IdentityFirstStage(nn.Module):
    """No first stage: diffusion on the pixels themselves."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x
