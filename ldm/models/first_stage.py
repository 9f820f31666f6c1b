"""What autoencoders share, whatever their latents are: the networks, one training step, the optimiser, pictures."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.models.optimization import SharedStepModule, optimizer_and_schedule
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.losses.adversarial import AdversarialLoss
from ldm.util import check_param_names, instantiate_from_config

DECODER_ONLY = ("give_pre_end", "tanh_out")
# Public configs name this class of the taming package, which fetches its networks from the web when it is built.
OTHER_NAMES = {"taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator":
               "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
IN_PROGRESS = ("psnr", "kl", "total_loss", "rec_loss", "disc_loss")  # what the progress bar shows


def image_batch(batch: Mapping[str, Tensor], key: str, channels: Sequence[int] = (1, 3)) -> Tensor:
    """`batch[key]` as float32 (B, C, H, W): the LDM family's datasets give (B, H, W, C), ours channels first."""
    images = batch[key]
    if images.ndim == 4 and images.shape[-1] in channels and images.shape[1] not in channels:
        images = images.movedim(-1, 1)
    return images.float().contiguous(memory_format=torch.channels_last)


class FirstStage(SharedStepModule):
    """An encoder, a decoder and a loss; subclasses say what lies between them.

    With an `AdversarialLoss` one optimiser trains two groups of parameters, the autoencoder's and the discriminator's,
    so that a step, its accumulated batches and its clipped gradients mean what they mean elsewhere.

    Args:
        ddconfig: constructor params of `Decoder`, all but two of which are the `Encoder`'s too.
        lossconfig: config of a module called as (images, reconstructions, what the latent gives, split) ->
            (loss, log).
        double_z: whether the encoder gives two numbers for each of the latent's.
        image_key: where a batch keeps its images.
        monitor: the logged number by which checkpoints are ranked.
        scheduler_config: config of a learning-rate multiplier.
        colorize_nlabels: channels of label maps; they are shown in random colours, which the buffer `colorize` holds.
        lr_g_factor: the autoencoder's learning rate in units of the discriminator's.
    """

    unread_keys = ("colorize",)  # checkpoints that have none fit too

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], *, double_z: bool,
                 image_key: str = "image", monitor: str | None = None,
                 scheduler_config: Mapping[str, Any] | None = None, colorize_nlabels: int | None = None,
                 lr_g_factor: float = 1.0) -> None:
        super().__init__()
        self.image_key, self.monitor, self.scheduler_config = image_key, monitor, scheduler_config
        self.lr_g_factor, self.learning_rate = lr_g_factor, 4.5e-6
        check_param_names("ddconfig", Decoder, ddconfig)
        if ddconfig.get("double_z", True) != double_z:
            wanted = "a mean and a log-variance" if double_z else "one number for each of the latent's"
            raise UserError(f"ddconfig: {type(self).__name__} needs {wanted}; set double_z: {str(double_z).lower()}")
        self.in_channels = ddconfig["in_channels"]
        self.encoder = Encoder(**{key: value for key, value in ddconfig.items() if key not in DECODER_ONLY})
        self.decoder = Decoder(**ddconfig)
        other_name = OTHER_NAMES.get(lossconfig.get("target"))
        self.loss = instantiate_from_config({**lossconfig, "target": other_name} if other_name else lossconfig)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    def setup(self, stage: str) -> None:
        """Makes the loss ready, which sampling has no use for.

        Raises:
            UserError: the loss trains nothing, or its networks' files are missing.
        """
        if isinstance(self.loss, nn.Identity):
            raise UserError("lossconfig: torch.nn.Identity trains nothing; name a loss, such as "
                            "ldm.modules.losses.LPIPSWithDiscriminator")
        if isinstance(self.loss, AdversarialLoss):
            self.loss.load_perceptual()

    def pictures(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        """The images of a batch, (B, C, H, W)."""
        return image_batch(batch, self.image_key, (self.in_channels,))

    def reconstructed(self, images: Tensor) -> tuple[Any, ...]:
        """Reconstructions (B, C, H, W), and what the loss is told of the latent."""
        return self(images)

    def step(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        images = self.pictures(batch, split)
        more = ({"step": self.global_step, "last_layer": self.decoder.last_layer}
                if isinstance(self.loss, AdversarialLoss) else {})
        loss, log = self.loss(images, *self.reconstructed(images), split=split, **more)
        for name, value in log.items():
            self.log(name, value, prog_bar=name.split("/")[-1] in IN_PROGRESS, batch_size=len(images))
        return loss

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the autoencoder."""
        raise NotImplementedError

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [{"params": self.trained_parameters(), "lr": self.lr_g_factor * self.learning_rate}]
        if isinstance(self.loss, AdversarialLoss):
            groups.append({"params": list(self.loss.discriminator.parameters()), "lr": self.learning_rate})
        return optimizer_and_schedule(torch.optim.Adam(groups, betas=(0.5, 0.9)), self.scheduler_config)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None,
                                    gradient_clip_algorithm: str | None = None) -> None:
        """Clips autoencoder and discriminator apart: neither's gradients shorten the other's."""
        if not gradient_clip_val or gradient_clip_algorithm == "value" or len(optimizer.param_groups) == 1:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], N: int = 8, **_: Any) -> dict[str, Tensor]:
        """The inputs and what comes back of them, for the log folder."""
        images = self.pictures(batch, "val")[:N].to(self.device)
        return {"inputs": self.to_rgb(images), "reconstructions": self.to_rgb(self.shown(images))}

    def shown(self, images: Tensor) -> Tensor:
        """The reconstructions that `log_images` shows."""
        return self(images)[0]

    def to_rgb(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) of more than three channels as pictures in [-1, 1]: in random colours or, without
        `colorize_nlabels`, the first three channels; others as they are."""
        if x.shape[1] <= 3 or not hasattr(self, "colorize"):
            return x[:, :3]
        coloured = F.conv2d(x, self.colorize)
        return 2 * (coloured - coloured.min()) / (coloured.max() - coloured.min()) - 1
