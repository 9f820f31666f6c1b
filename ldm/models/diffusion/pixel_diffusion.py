"""DDPM: diffusion on images themselves (Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020)."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.models.autoencoder import image_batch
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.objectives import check_loss_type, error_per_sample, training_target
from ldm.models.diffusion.schedule import check_parameterization, diffusion_buffers, lvlb_weights, q_sample
from ldm.models.diffusion.wrapper import Condition, DiffusionWrapper, as_model_kwargs
from ldm.models.optimization import ResumableModule, can_use_fused_optimizer, optimizer_and_schedule
from ldm.modules.ema import LitEma
from ldm.util import to_device

log = logging.getLogger(__name__)


class DDPM(ResumableModule):
    """A denoising network, its noise schedule and its objective.

    Args:
        unet_config: config of the network.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas, v_posterior: see
            `ldm.models.diffusion.schedule.diffusion_buffers`.
        loss_type: "l1" or "l2".
        ckpt_path, ignore_keys, load_only_unet: weights to start from, without keys that begin with one of these, or
            those of the network only.
        monitor: the logged number by which checkpoints are ranked.
        use_ema: keep an exponential moving average of the network's weights; validation and sampling use it.
        first_stage_key: where a batch keeps its images, (B, H, W, C) or (B, C, H, W) in [-1, 1].
        image_size, channels: side (or height and width) and channels of what is denoised.
        log_every_t: every which step of a sampling is kept for display.
        clip_denoised: kept for the public configs; latents have no range to clip to.
        l_simple_weight, original_elbo_weight: weights of Eq. 14 and of the variational bound.
        conditioning_key: how the condition enters, see `DiffusionWrapper`.
        parameterization: what the network predicts: "eps", "x0" or "v".
        scheduler_config: config of a learning-rate multiplier.
        use_positional_encodings: kept for the public configs, must be false.
        timestep_shift: training draws steps T s u / (1 + (s - 1) u), u uniform (Esser et al. 2024, "Scaling Rectified
            Flow Transformers", Eq. 23): above 1 noisier ones, where it is decided what a picture shows; 1: uniformly.
        learn_logvar, logvar_init: whether the log-variance of each timestep's error is learned, and its start.
    """

    def __init__(self, unet_config: Mapping[str, Any], timesteps: int = 1000, beta_schedule: str = "linear",
                 loss_type: str = "l2", ckpt_path: str | None = None, ignore_keys: Sequence[str] = (),
                 load_only_unet: bool = False, monitor: str = "val/loss", use_ema: bool = True,
                 first_stage_key: str = "image", image_size: int | Sequence[int] = 256, channels: int = 3,
                 log_every_t: int = 100, clip_denoised: bool = True, linear_start: float = 1e-4,
                 linear_end: float = 2e-2, cosine_s: float = 8e-3, given_betas: Sequence[float] | None = None,
                 original_elbo_weight: float = 0.0, v_posterior: float = 0.0, l_simple_weight: float = 1.0,
                 conditioning_key: str | None = None, parameterization: str = "eps",
                 scheduler_config: Mapping[str, Any] | None = None, use_positional_encodings: bool = False,
                 learn_logvar: bool = False, logvar_init: float = 0.0, timestep_shift: float = 1.0) -> None:
        super().__init__()
        check_parameterization(parameterization)
        check_loss_type(loss_type)
        if use_positional_encodings:
            raise UserError("use_positional_encodings is not supported; leave it out of the config")
        self.parameterization, self.loss_type, self.monitor = parameterization, loss_type, monitor
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.scheduler_config = log_every_t, scheduler_config
        if timestep_shift <= 0:
            raise UserError(f"timestep_shift {timestep_shift} must be above 0; 1 draws all steps equally often")
        self.timestep_shift = timestep_shift
        self.l_simple_weight, self.original_elbo_weight = l_simple_weight, original_elbo_weight
        self.learning_rate = 1e-4
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        buffers = diffusion_buffers(beta_schedule, timesteps, linear_start, linear_end, cosine_s, given_betas,
                                    v_posterior)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("lvlb_weights", lvlb_weights(buffers, parameterization), persistent=False)
        self.schedule_names = tuple(buffers)
        self.num_timesteps = len(self.betas)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self._initial_weights = (ckpt_path, ignore_keys, load_only_unet)
        if type(self) is DDPM:
            self.load_initial_weights()

    def load_initial_weights(self) -> None:
        """Loads `ckpt_path`; a subclass calls it when all its parts are there.

        The noise schedule stays as the config describes it: half-precision files hold it rounded, to 1 at its start.
        """
        from ldm.checkpoints.load import load_weights

        path, ignore_keys, only_unet = self._initial_weights
        if path is not None:
            loaded = load_weights(self.model if only_unet else self, path, [*ignore_keys, *self.schedule_names])
            if self.use_ema and not {f"model_ema.{name}" for name in self.model_ema.state_dict()} <= loaded:
                self.model_ema = LitEma(self.model)  # the file had no averages: they start from these weights

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        size = self.image_size
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def apply_model(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's output on x (B, C, H, W) at the steps t (B,) under a condition for each."""
        return self.model(x, t, **as_model_kwargs(cond, self.model.conditioning_key))

    def get_input(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """What is denoised, (B, C, H, W), and the condition, of a batch."""
        return image_batch(batch, self.first_stage_key), None

    def loss_weight(self, batch: Mapping[str, Any], size: torch.Size) -> Tensor | None:
        """The weight of each position's error, (B, 1, *size), or None where all weigh the same."""
        return None

    def p_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                 weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective at the steps t (B,) and the numbers to log."""
        losses, numbers = self.per_sample_losses(x_start, cond, t, noise, weight)
        return losses.mean(), {name: values.mean() for name, values in numbers.items()}

    def per_sample_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                      weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of each sample at its step t, and the numbers to log, each (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(q_sample(self, x_start, t, noise), t, cond)
        target = training_target(self, self.parameterization, x_start, noise, t)
        error = error_per_sample(output, target, self.loss_type, weight)
        logvar = self.logvar[t]
        losses = self.l_simple_weight * (error / logvar.exp() + logvar)
        numbers = {"loss_simple": error.detach()}
        if self.original_elbo_weight:
            bound = self.lvlb_weights[t] * error
            losses = losses + self.original_elbo_weight * bound
            numbers["loss_vlb"] = bound.detach()
        return losses, {**numbers, "loss": losses.detach()}

    def sample_timesteps(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """(count,) steps in [0, T) to train on; drawn where the generator is, if there is one."""
        drawn_on = device if generator is None else generator.device
        if self.timestep_shift == 1:
            return to_device(torch.randint(self.num_timesteps, (count,), device=drawn_on, generator=generator), device)
        u = to_device(torch.rand(count, device=drawn_on, generator=generator), device)
        shifted = self.timestep_shift * u / (1 + (self.timestep_shift - 1) * u)
        return (shifted * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x_start, cond = self.get_input(batch)
        t = self.sample_timesteps(len(x_start), x_start.device)
        return self.p_losses(x_start, cond, t, weight=self.loss_weight(batch, x_start.shape[-2:]))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, numbers = self.shared_step(batch)
        self.log_dict({f"train/{name}": value for name, value in numbers.items()}, prog_bar=True,
                      batch_size=len(batch[self.first_stage_key]))
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size = len(batch[self.first_stage_key])
        self.log_dict({f"val/{name}": value for name, value in self.shared_step(batch)[1].items()}, batch_size=size)
        if self.use_ema:
            with self.ema_scope():
                numbers = self.shared_step(batch)[1]
            self.log_dict({f"val/{name}_ema": value for name, value in numbers.items()}, batch_size=size)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within it the network has its averaged weights, where averages are kept."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.averaged(self.model):
            yield

    def trained_parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate, fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, ddim_steps: int = 50) -> dict[str, Tensor]:
        """Images of the batch and fresh samples, for the log folder."""
        images, _ = self.get_input(batch)
        with self.ema_scope():
            samples, _ = DDIMSampler(self).sample(ddim_steps, N, self.latent_shape, verbose=False)
        return {"inputs": images[:N], "samples": samples}
