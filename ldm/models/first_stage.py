"""The base class of autoencoders: networks, training step, optimizer and images for the log."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.models.optimization import SharedStepModule, optimizer_and_schedule
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.losses.adversarial import AdversarialLoss
from ldm.util import check_param_names, instantiate_from_config

log = logging.getLogger(__name__)

DECODER_ONLY = ("give_pre_end", "tanh_out")
# Public configs name this class of the taming package, which downloads its networks when it is built.
OTHER_NAMES = {"taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator":
               "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
PROGRESS_BAR = ("psnr", "kl", "total_loss", "rec_loss", "disc_loss")  # the terms that it shows


def image_batch(batch: Mapping[str, Tensor], key: str, channels: Sequence[int] = (1, 3)) -> Tensor:
    """Return the images `batch[key]` as float32 (B, C, H, W), contiguous, so that noise like them has that order.

    Datasets of the LDM family give (B, H, W, C) or (B, H, W), ours (B, C, H, W).

    Args:
        channels: the numbers of channels by which the two are told apart, or else by which sides are equal.
    """
    images = batch[key]
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and not _has_channels_first(images.shape, channels):
        images = images.movedim(-1, 1)
    return images.float().contiguous()


def _has_channels_first(shape: Sequence[int], channels: Sequence[int]) -> bool:
    if shape[1] in channels or shape[-1] in channels:
        return shape[1] in channels
    return shape[2] == shape[3] != shape[1]


class FirstStage(SharedStepModule):
    """An encoder, a decoder and a loss. Subclasses add what lies between them.

    With an `AdversarialLoss` one optimizer trains two parameter groups, the autoencoder's and the discriminator's. So a
    step, accumulated batches and gradient clipping mean the same as in other models.

    Args:
        ddconfig: constructor params of `Decoder`, all but two of which the `Encoder` takes as well.
        lossconfig: config of a module called as (images, reconstructions, outputs for the latent, split) ->
            (loss, log).
        double_z: whether the encoder outputs two numbers per latent value, a mean and a log-variance.
        image_key: key of a batch's images.
        monitor: name of the logged value by which checkpoints are ranked.
        scheduler_config: config of a learning-rate multiplier.
        colorize_nlabels: number of channels of label maps, which are shown in random colors (buffer `colorize`).
        lr_g_factor: learning rate of the autoencoder divided by the discriminator's.
    """

    unread_keys = ("colorize",)  # checkpoints without it fit as well

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], *, double_z: bool,
                 image_key: str = "image", monitor: str | None = None,
                 scheduler_config: Mapping[str, Any] | None = None, colorize_nlabels: int | None = None,
                 lr_g_factor: float = 1.0) -> None:
        super().__init__()
        self.image_key = image_key
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        self.learning_rate = 4.5e-6
        check_param_names("ddconfig", Decoder, ddconfig)
        if ddconfig.get("double_z", True) != double_z:
            outputs = "a mean and a log-variance" if double_z else "one number per latent value"
            raise UserError(f"ddconfig: {type(self).__name__} needs {outputs}; set double_z: {str(double_z).lower()}")
        self.in_channels = ddconfig["in_channels"]
        self.encoder = Encoder(**{key: value for key, value in ddconfig.items() if key not in DECODER_ONLY})
        self.decoder = Decoder(**ddconfig)
        other_name = OTHER_NAMES.get(lossconfig.get("target"))
        self.loss = instantiate_from_config({**lossconfig, "target": other_name} if other_name else lossconfig)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    # Averages of the weights, which subclasses ask for at the end of their constructors

    def keep_averages(self, use_ema: bool, decay: float = 0.9999) -> None:
        """Keep an exponential moving average of the weights if `use_ema`."""
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self, decay=decay)

    def restart_averages(self, loaded: Set[str]) -> None:
        """Start averaging from the current weights unless the averages are among the keys that were loaded."""
        if self.use_ema and not {f"model_ema.{name}" for name in self.model_ema.state_dict()} <= loaded:
            self.model_ema = LitEma(self, decay=float(self.model_ema.decay))

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within this context the model has its averaged weights, if it keeps any; `context` is for the log."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.averaged(self):
            if context is not None:
                log.info("%s: with the averaged weights", context)
            yield

    def update_averages(self) -> None:
        if self.use_ema:
            self.model_ema(self)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        if self.use_ema:
            with self.ema_scope():
                self.step(batch, "val_ema")
        return loss

    # Training

    def setup(self, stage: str) -> None:
        """Load the networks that the loss needs. Sampling does without them.

        Raises:
            UserError: if the loss trains nothing, or the files of its networks are missing.
        """
        if isinstance(self.loss, nn.Identity):
            raise UserError("lossconfig: torch.nn.Identity trains nothing; name a loss, such as "
                            "ldm.modules.losses.LPIPSWithDiscriminator")
        if isinstance(self.loss, AdversarialLoss):
            self.loss.load_perceptual()

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Return the images under key `k` of a batch, (B, C, H, W)."""
        return image_batch(batch, k, (self.in_channels,))

    def get_last_layer(self) -> nn.Parameter:
        """Return the weights of the decoder's last layer, to whose gradients adversarial losses are compared."""
        return self.decoder.last_layer

    def input_images(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        """Return the images of a batch in channels-last memory format, (B, C, H, W)."""
        return self.get_input(batch, self.image_key).contiguous(memory_format=torch.channels_last)

    def reconstruct(self, images: Tensor) -> tuple[Any, ...]:
        """Return reconstructions (B, C, H, W), and what the loss needs to know about the latents."""
        return self(images)

    def step(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        images = self.input_images(batch, split)
        adversarial: dict[str, Any] = {}
        if isinstance(self.loss, AdversarialLoss):
            adversarial = {"step": self.global_step, "last_layer": self.get_last_layer()}
        loss, log = self.loss(images, *self.reconstruct(images), split=split, **adversarial)
        for name, value in log.items():
            self.log(name, value, prog_bar=name.split("/")[-1] in PROGRESS_BAR, batch_size=len(images))
        return loss

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the autoencoder that are trained."""
        raise NotImplementedError

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [{"params": self.trained_parameters(), "lr": self.lr_g_factor * self.learning_rate}]
        if isinstance(self.loss, AdversarialLoss):
            groups.append({"params": list(self.loss.discriminator.parameters()), "lr": self.learning_rate})
        return optimizer_and_schedule(torch.optim.Adam(groups, betas=(0.5, 0.9)), self.scheduler_config)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None,
                                    gradient_clip_algorithm: str | None = None) -> None:
        """Clip autoencoder and discriminator separately: large gradients of one do not shrink those of the other."""
        if not gradient_clip_val or gradient_clip_algorithm == "value" or len(optimizer.param_groups) == 1:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def logged_inputs(self, batch: Mapping[str, Tensor], count: int | None) -> Tensor:
        """Return the first `count` images of a batch, or all, for the log."""
        return self.input_images(batch, "val")[:count].to(self.device)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Return maps (B, C, H, W) as RGB images in [-1, 1].

        Maps of more than three channels get random colors, or keep only three channels without `colorize_nlabels`.
        """
        if x.shape[1] <= 3 or not hasattr(self, "colorize"):
            return x[:, :3]
        colored = F.conv2d(x, self.colorize)
        return 2 * (colored - colored.min()) / (colored.max() - colored.min()) - 1
