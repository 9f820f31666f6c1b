"""DDPM: diffusion on images (Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020)."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.models.autoencoder import image_batch
from ldm.models.diffusion.objectives import check_loss_type, error_per_sample, training_target
from ldm.models.diffusion.wrapper import Condition, DiffusionWrapper, as_model_kwargs
from ldm.models.initial_weights import LoadsInitialWeights
from ldm.models.optimization import ResumableModule, can_use_fused_optimizer, optimizer_and_schedule
from ldm.models.random_state import RandomState
from ldm.modules.ema import LitEma
from ldm.sampling.ddim import DDIM
from ldm.sampling.schedule import check_parameterization, diffusion_buffers, lvlb_weights, q_sample
from ldm.util import to_device

log = logging.getLogger(__name__)


class DDPM(LoadsInitialWeights, ResumableModule):
    """A denoising network, its noise schedule and its training objective.

    Args:
        unet_config: config of the network.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas, v_posterior: see
            `ldm.sampling.schedule.diffusion_buffers`.
        loss_type: "l1" or "l2".
        ckpt_path: checkpoint of the initial weights. It must hold all parts of the model, those of a subclass too.
        ignore_keys: beginnings of keys that are neither required nor loaded.
        load_only_unet: load only the network's weights.
        monitor: name of the logged value by which checkpoints are ranked.
        use_ema: keep an exponential moving average of the network's weights; validation logs it as well, and images
            for the log are sampled with it.
        first_stage_key: key of a batch's images, (B, H, W, C) or (B, C, H, W) in [-1, 1].
        image_size, channels: side (or height and width) and channels of what is denoised.
        log_every_t: interval of the sampling steps that are kept for display.
        clip_denoised: accepted for the public configs; latents have no range to clip to.
        l_simple_weight, original_elbo_weight: weights of DDPM Eq. 14 and of the variational bound.
        conditioning_key: how the condition enters, see `DiffusionWrapper`.
        parameterization: what the network predicts: "eps", "x0" or "v".
        scheduler_config: config of a learning-rate multiplier.
        use_positional_encodings: accepted for the public configs; must be false.
        learn_logvar, logvar_init: whether the log-variance of each timestep's error is learned, and its initial value.
        timestep_shift: s in T s u / (1 + (s - 1) u), the distribution of training timesteps for uniform u (Esser et al.
            2024, "Scaling Rectified Flow Transformers", Eq. 23). Above 1, noisy timesteps, which decide the content of
            an image, are more frequent; 1 is uniform.
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
        if timestep_shift <= 0:
            raise UserError(f"timestep_shift {timestep_shift} must be above 0; 1 samples all timesteps equally often")
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.l_simple_weight = l_simple_weight
        self.original_elbo_weight = original_elbo_weight
        self.timestep_shift = timestep_shift
        self.monitor = monitor
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.scheduler_config = scheduler_config
        self.learning_rate = 1e-4
        # The network, and the averages of its weights
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        # The noise schedule
        buffers = diffusion_buffers(beta_schedule, timesteps, linear_start, linear_end, cosine_s, given_betas,
                                    v_posterior)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("lvlb_weights", lvlb_weights(buffers, parameterization), persistent=False)
        self.schedule_names = tuple(buffers)
        self.num_timesteps = len(self.betas)
        # The log-variance of each timestep's error
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self._initial_weights = (ckpt_path, ignore_keys, load_only_unet)

    def _load_initial_weights(self) -> None:
        """Load `ckpt_path`.

        The noise schedule stays as the config describes it: half-precision files round its first values to 1.
        """
        from ldm.checkpoints.load import load_weights

        path, ignore_keys, only_unet = self._initial_weights
        if path is None:
            return
        loaded = load_weights(self.model if only_unet else self, path, [*ignore_keys, *self.schedule_names])
        if self.use_ema and not {f"model_ema.{name}" for name in self.model_ema.state_dict()} <= loaded:
            self.model_ema = LitEma(self.model)  # without averages in the file, averaging starts from these weights

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        size = self.image_size
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def apply_model(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the network's output at x (B, C, H, W) and timesteps t (B,), with a condition for each."""
        return self.model(x, t, **as_model_kwargs(cond, self.model.conditioning_key))

    def get_input(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return what is denoised, (B, C, H, W), and the condition of a batch."""
        return image_batch(batch, self.first_stage_key), None

    # Objective

    def loss_weight(self, batch: Mapping[str, Any], size: torch.Size) -> Tensor | None:
        """Return the weights of the positions' errors, (B, 1, *size), or None if all are 1."""
        return None

    def p_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                 weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss at timesteps t (B,), and its terms for the log."""
        losses, terms = self.per_sample_losses(x_start, cond, t, noise, weight)
        return losses.mean(), {name: values.mean() for name, values in terms.items()}

    def per_sample_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                          weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each sample at its timestep t, and its terms for the log, each (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        # DDPM Algorithm 1: noise the image, predict, and compare with the target
        output = self.apply_model(q_sample(self, x_start, t, noise), t, cond)
        target = training_target(self, self.parameterization, x_start, noise, t)
        error = error_per_sample(output, target, self.loss_type, weight)
        # with a learned variance, the negative log-likelihood of the error
        logvar = self.logvar[t]
        losses = self.l_simple_weight * (error / logvar.exp() + logvar)
        terms = {"loss_simple": error.detach()}
        if self.original_elbo_weight:
            bound = self.lvlb_weights[t] * error
            losses = losses + self.original_elbo_weight * bound
            terms["loss_vlb"] = bound.detach()
        return losses, {**terms, "loss": losses.detach()}

    def sample_timesteps(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Return (count,) random training timesteps in [0, T), generated on the generator's device if there is one."""
        source = device if generator is None else generator.device
        if self.timestep_shift == 1:
            return to_device(torch.randint(self.num_timesteps, (count,), device=source, generator=generator), device)
        u = to_device(torch.rand(count, device=source, generator=generator), device)
        shifted = self.timestep_shift * u / (1 + (self.timestep_shift - 1) * u)
        return (shifted * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch at random timesteps, and its terms for the log."""
        x_start, cond = self.get_input(batch)
        t = self.sample_timesteps(len(x_start), x_start.device)
        return self.p_losses(x_start, cond, t, weight=self.loss_weight(batch, x_start.shape[-2:]))

    # Training

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, terms = self.shared_step(batch)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, prog_bar=True,
                      batch_size=len(batch[self.first_stage_key]))
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss, and with averages their loss at the same timesteps and noise."""
        size = len(batch[self.first_stage_key])
        random_state = RandomState(self.device)
        terms = self.shared_step(batch)[1]
        self.log_dict({f"val/{name}": value for name, value in terms.items()}, batch_size=size)
        if self.use_ema:
            with random_state.replayed(), self.ema_scope():
                terms = self.shared_step(batch)[1]
            self.log_dict({f"val/{name}_ema": value for name, value in terms.items()}, batch_size=size)

    def update_averages(self) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within this context the network has its averaged weights, if it keeps any."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.averaged(self.model):
            yield

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.trained_parameters(), lr=self.learning_rate,
                                      fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, ddim_steps: int = 50) -> dict[str, Tensor]:
        """Return images of the batch and new samples for the log folder."""
        images, _ = self.get_input(batch)
        with self.ema_scope():
            samples, _ = DDIM(self).sample(ddim_steps, N, self.latent_shape, verbose=False)
        return {"inputs": images[:N], "samples": samples}
