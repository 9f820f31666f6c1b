"""DDPM: diffusion on images (Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020)."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.load import load_weights
from ldm.common.errors import UserError
from ldm.models.autoencoder import image_batch
from ldm.models.diffusion.ancestral_sampling import AncestralSampling
from ldm.models.diffusion.logged_images import LogsPixelDiffusion
from ldm.models.diffusion.objectives import ERRORS, check_loss_type, training_target
from ldm.models.diffusion.weight_fitting import repeat_to_fit
from ldm.models.diffusion.wrapper import Condition, DiffusionWrapper, as_model_kwargs
from ldm.models.initial_weights import LoadsInitialWeights
from ldm.models.optimization import ResumableModule, can_use_fused_optimizer, optimizer_and_schedule
from ldm.models.random_state import RandomState
from ldm.modules.ema import LitEma
from ldm.sampling.schedule import check_parameterization
from ldm.util import to_device

log = logging.getLogger(__name__)


class DDPM(AncestralSampling, LogsPixelDiffusion, LoadsInitialWeights, ResumableModule):
    """A denoising network, its noise schedule and its training objective.

    A training step calls `training_step`, `shared_step`, `get_input`, `forward`, `p_losses`, then `q_sample`,
    `apply_model` and `get_loss`, in this order. A subclass may override each of them.

    Args:
        unet_config: config of the network.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas, v_posterior, zero_terminal_snr: see
            `ldm.sampling.schedule.diffusion_buffers`. A schedule that ends in pure noise needs "v" or "x0".
        loss_type: "l1" or "l2".
        ckpt_path: checkpoint of the initial weights. It must hold all parts of the model; those that a subclass adds
            may be missing.
        ignore_keys: beginnings of keys that are neither required nor loaded.
        load_only_unet: load only the network's weights.
        monitor: name of the logged value by which checkpoints are ranked.
        use_ema: keep an exponential moving average of the network's weights; validation logs it as well, and images
            for the log are sampled with it.
        first_stage_key: key of a batch's images, (B, H, W, C) or (B, C, H, W) in [-1, 1].
        image_size, channels: side (or height and width) and channels of what is denoised.
        log_every_t: interval of the sampling steps that are kept for display.
        clip_denoised: limit the images that `sample` predicts to [-1, 1]. Latents have no such range.
        l_simple_weight, original_elbo_weight: weights of DDPM Eq. 14 and of `loss_vlb`, see `lvlb_weights`.
        conditioning_key: how the condition enters, see `DiffusionWrapper`.
        parameterization: what the network predicts: "eps", "x0" or "v".
        scheduler_config: config of a learning-rate multiplier.
        use_positional_encodings: accepted for the public configs; must be false.
        learn_logvar, logvar_init: whether the log-variance of each timestep's error is learned, and its initial value.
        make_it_fit: repeat the weights of `ckpt_path` where this model has other numbers of channels.
        ucg_training: key of a batch -> {"p", "val"}, the share of its entries that training replaces by `val` (None:
            the empty text), for guidance.
        reset_ema, reset_num_ema_updates: start the averages of `ckpt_path`, or their number of updates, again.
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
                 learn_logvar: bool = False, logvar_init: float = 0.0, make_it_fit: bool = False,
                 ucg_training: Mapping[str, Mapping[str, Any]] | None = None, reset_ema: bool = False,
                 reset_num_ema_updates: bool = False, timestep_shift: float = 1.0,
                 zero_terminal_snr: bool = False) -> None:
        super().__init__()
        check_parameterization(parameterization)
        check_loss_type(loss_type)
        if use_positional_encodings:
            raise UserError("use_positional_encodings is not supported; leave it out of the config")
        if (reset_ema or reset_num_ema_updates) and not use_ema:
            raise UserError("reset_ema, reset_num_ema_updates: need use_ema")
        if timestep_shift <= 0:
            raise UserError(f"timestep_shift {timestep_shift} must be above 0; 1 samples all timesteps equally often")
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.l_simple_weight = l_simple_weight
        self.original_elbo_weight = original_elbo_weight
        self.v_posterior = v_posterior
        self.timestep_shift = timestep_shift
        self.make_it_fit = make_it_fit
        self.ucg_training = dict(ucg_training or {})
        self.reset_ema, self.reset_num_ema_updates = reset_ema, reset_num_ema_updates
        self.monitor = monitor
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.clip_denoised = clip_denoised
        self.use_positional_encodings = use_positional_encodings
        self.use_scheduler = scheduler_config is not None
        self.scheduler_config = scheduler_config
        self.learning_rate = 1e-4
        self.cond_stage_model = None
        # The network, and the averages of its weights
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        # The noise schedule
        self.register_schedule(given_betas=given_betas, beta_schedule=beta_schedule, timesteps=timesteps,
                               linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s,
                               **({"zero_terminal_snr": True} if zero_terminal_snr else {}))
        # The log-variance of each timestep's error
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        only_model = {"only_model": True} if load_only_unet else {}
        self.set_initial_weights(ckpt_path, ignore_keys=ignore_keys, **only_model)

    # Weights

    part_paths: Mapping[str, str] = MappingProxyType({})  # prefix of a part's keys -> file to take that part from

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load a checkpoint. Parts that it lacks stay as they are; a warning lists them.

        The noise schedule stays as the config describes it: half-precision files round its first values to 1.

        Args:
            ignore_keys: beginnings of keys that are not loaded.
            only_model: load the network's weights alone.

        Raises:
            UserError: if weights do not fit, or the constructor loads `ckpt_path` and a part of this class is missing.
        """
        loaded = load_weights(self.model if only_model else self, path, [*ignore_keys, *self.schedule_names],
                              self.optional_keys(), self.adapt_weight, self.part_paths)
        if self.use_ema and not {f"model_ema.{name}" for name in self.model_ema.state_dict()} <= loaded:
            self.model_ema = LitEma(self.model)  # without averages in the file, averaging starts from these weights
        self.has_initial_weights = True

    def adapt_weight(self, key: str, stored: Tensor, own: Tensor) -> Tensor:
        """Return what a checkpoint's tensor means for the model's `own`. Subclasses extend those of other shapes."""
        return repeat_to_fit(stored, own) if self.make_it_fit else stored

    def load_initial_weights(self) -> None:
        super().load_initial_weights()
        if self.use_ema and self.reset_ema:
            self.model_ema = LitEma(self.model)
        if self.use_ema and self.reset_num_ema_updates:
            self.model_ema.reset_num_updates()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as `nn.Module` does, except that files may hold `logvar`, as ControlNet's do."""
        if not self.learn_logvar and "logvar" in state_dict:
            state_dict = {key: value for key, value in state_dict.items() if key != "logvar"}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        size = self.image_size
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None, return_ids: bool = False) -> Any:
        """Return the network's output at x (B, C, H, W) and timesteps t (B,), with a condition for each.

        Args:
            cond: a tensor or a list of them, which the `conditioning_key` of `DiffusionWrapper` routes, or its keywords
                `c_crossattn`, `c_concat` (lists) and `c_adm` (a tensor) in a dict.
            return_ids: of a network that returns a tuple, return all of it instead of its first value.
        """
        output = self.model(x_noisy, t, **as_model_kwargs(cond, self.model.conditioning_key))
        return output[0] if isinstance(output, tuple) and not return_ids else output

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """Return the images under key `k` of a batch, (B, C, H, W); subclasses return a condition as well."""
        return image_batch(batch, k)

    # Objective

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Return the error of each element of `pred`, or the mean of them."""
        error = ERRORS[self.loss_type](pred, target)
        return error.mean() if mean else error

    def errors_per_sample(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                          weight: Tensor | None = None) -> Tensor:
        """Return the mean error of the network's output for each sample, (B,).

        Args:
            x_start: (B, C, H, W), what is noised.
            t: (B,) timesteps.
            noise: of the shape of `x_start`; None: new noise.
            weight: (B, 1, H, W), factors of the positions' errors; None: all 1.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        # DDPM Algorithm 1: noise the image, predict, and compare with the target
        output = self.apply_model(self.q_sample(x_start=x_start, t=t, noise=noise), t, cond)
        target = training_target(self, self.parameterization, x_start, noise, t)
        error = self.get_loss(output.float(), target.float(), mean=False)
        return (error if weight is None else error * weight).flatten(1).mean(1)

    def weighted_losses(self, errors: Tensor, t: Tensor) -> Tensor:
        """Return the negative log-likelihood of errors (B,) under the variance of their timesteps t."""
        logvar = self.logvar[t]
        return errors / logvar.exp() + logvar

    def per_sample_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                          weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each sample at its timestep t, and its terms for the log, each (B,).

        Arguments as for `errors_per_sample`.
        """
        errors = self.errors_per_sample(x_start, cond, t, noise, weight)
        losses = self.l_simple_weight * self.weighted_losses(errors, t)
        terms = {"loss_simple": errors.detach()}
        if self.original_elbo_weight:
            bound = self.lvlb_weights[t] * errors
            losses = losses + self.original_elbo_weight * bound
            terms["loss_vlb"] = bound.detach()
        return losses, {**terms, "loss": losses.detach()}

    def loss_and_terms(self, errors: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of errors (B,) at timesteps t, and its terms under the family's names for the log."""
        split = "train" if self.training else "val"
        terms = {f"{split}/loss_simple": errors.mean().detach()}
        losses = self.weighted_losses(errors, t)
        if self.learn_logvar:
            terms |= {f"{split}/loss_gamma": losses.mean().detach(), "logvar": self.logvar.detach().mean()}
        bound = (self.lvlb_weights[t] * errors).mean()
        loss = self.l_simple_weight * losses.mean() + self.original_elbo_weight * bound
        return loss, {**terms, f"{split}/loss_vlb": bound.detach(), f"{split}/loss": loss.detach()}

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss at timesteps t (B,), and its terms for the log."""
        return self.loss_and_terms(self.errors_per_sample(x_start, None, t, noise), t)

    def sample_timesteps(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Return (count,) random training timesteps in [0, T), generated on the generator's device if there is one."""
        source = device if generator is None else generator.device
        if self.timestep_shift == 1:
            return to_device(torch.randint(self.num_timesteps, (count,), device=source, generator=generator), device)
        u = to_device(torch.rand(count, device=source, generator=generator), device)
        shifted = self.timestep_shift * u / (1 + (self.timestep_shift - 1) * u)
        return (shifted * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `p_losses` does for x (B, C, H, W), at random timesteps."""
        return self.p_losses(x, self.sample_timesteps(len(x), self.device), *args, **kwargs)

    def shared_step(self, batch: Mapping[str, Any], **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch at random timesteps, and its terms for the log."""
        return self(self.get_input(batch, self.first_stage_key))

    # Training

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        for key, rule in self.ucg_training.items():
            for index in (np.random.random(len(batch[key])) < rule["p"]).nonzero()[0]:
                batch[key][index] = "" if rule["val"] is None else rule["val"]
        loss, terms = self.shared_step(batch)
        self.log_terms(terms, batch)
        return loss

    def log_terms(self, terms: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Log the terms of a training step and, if it follows a schedule, the learning rate as `lr_abs`."""
        size = self._batch_size(batch)
        self.log_dict(terms, prog_bar=True, batch_size=size)
        if self.use_scheduler and self._trainer is not None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, batch_size=size)

    def _batch_size(self, batch: Mapping[str, Any]) -> int | None:
        images = batch.get(self.first_stage_key)
        return None if images is None else len(images)

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss, and as "..._ema" that of the averaged weights at the same timesteps and noise.

        Without averages both are the same, so that a `monitor` of either kind exists.
        """
        size = self._batch_size(batch)
        random_state = RandomState(self.device)
        terms = averaged = self.shared_step(batch)[1]
        if self.use_ema:
            with random_state.replayed(), self.ema_scope():
                averaged = self.shared_step(batch)[1]
        self.log_dict(terms, batch_size=size)
        self.log_dict({f"{name}_ema": value for name, value in averaged.items()}, batch_size=size)

    def update_averages(self) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within this context the network has its averaged weights, if it keeps any.

        Args:
            context: what the averages are used for, for the log.
        """
        if not self.use_ema:
            yield
            return
        with self.model_ema.averaged(self.model):
            if context is not None:
                log.info("%s: with the averaged weights", context)
            yield

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return them in groups with a learning rate each."""
        return [{"params": self.trained_parameters(), "lr": self.learning_rate}]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameter_groups(), fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)
