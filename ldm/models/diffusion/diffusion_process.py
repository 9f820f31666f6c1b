"""The Gaussian process that a diffusion model inverts, as methods of the model (Ho et al. 2020, DDPM, Sec. 2).

Names, parameters and results are those of the LDM family. The schedule itself is in `ldm.sampling.schedule`.
Notation: x_start is x_0 and x_t its noisy version, both (B, ...); t holds B timesteps in [0, T).
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.modules.distributions.distributions import normal_kl
from ldm.sampling import schedule

Moments = tuple[Tensor, Tensor, Tensor]  # mean, variance and its logarithm


class DiffusionProcess:
    """Mixin for modules with a noise schedule.

    Attributes:
        parameterization: what the network predicts: "eps", "x0" or "v".
        v_posterior: 0..1, moves the variance of a reverse step from its lower bound to its upper bound.
        num_timesteps: T.
        linear_start, linear_end: what `register_schedule` was given.
        schedule_names: names of the schedule's buffers that checkpoints hold.
    """

    parameterization: str
    v_posterior: float

    def register_schedule(self, given_betas: Sequence[float] | Tensor | None = None, beta_schedule: str = "linear",
                          timesteps: int = 1000, linear_start: float = 1e-4, linear_end: float = 2e-2,
                          cosine_s: float = 8e-3, zero_terminal_snr: bool = False) -> None:
        """Register the buffers of a noise schedule. For the arguments see `ldm.sampling.schedule.diffusion_buffers`."""
        buffers = schedule.diffusion_buffers(beta_schedule, timesteps, linear_start, linear_end, cosine_s, given_betas,
                                             self.v_posterior, zero_terminal_snr)
        schedule.check_terminal_snr(buffers["alphas_cumprod"], self.parameterization)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        weights = schedule.lvlb_weights(buffers, self.parameterization)
        self.register_buffer("lvlb_weights", weights, persistent=False)
        self.schedule_names = tuple(buffers)
        self.num_timesteps = len(self.betas)
        self.linear_start, self.linear_end = linear_start, linear_end

    # Forward: from images to noise

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_t for noise of the shape of `x_start`; None: new noise."""
        return schedule.q_sample(self, x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Moments:
        """Return mean, variance and log-variance of q(x_t | x_0) (Eq. 4)."""
        mean = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance = extract_into_tensor(1 - self.alphas_cumprod, t, x_start.shape)
        return mean, variance, extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity of x_0 `x` and its noise (Salimans & Ho 2022, Sec. 4)."""
        return schedule.get_v(self, x, noise, t)

    # Backward: what a prediction says about x_0 and the noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the x_0 that became x_t by this noise."""
        scale = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape)
        return scale * x_t - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the x_0 at which x_t has the velocity `v`."""
        scale = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape)
        return scale * x_t - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the noise in x_t, which has the velocity `v`."""
        scale = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_t.shape)
        return scale * v + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * x_t

    def predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Return the x_0 that the network's output at x_t means."""
        if self.parameterization == "eps":
            return self.predict_start_from_noise(x_t, t=t, noise=output)
        if self.parameterization == "v":
            return self.predict_start_from_z_and_v(x_t, t, output)
        return output

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """Return the noise that leads from `pred_xstart` to x_t."""
        scaled = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return (scaled - pred_xstart) / extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Moments:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (Eq. 7)."""
        mean = extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
        mean = mean + extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t
        variance = extract_into_tensor(self.posterior_variance, t, x_t.shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Return the bits per dimension that x_T still says about x_0, (B,); nothing can train them away."""
        last = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return normal_kl(mean, log_variance, 0.0, 0.0).flatten(1).mean(1) / math.log(2)

    # Conditions that become noisy as well

    def make_cond_schedule(self) -> None:
        """Set `cond_ids` (T,): the timestep to which a condition is noised at each timestep of the image.

        The first `num_timesteps_cond` of them are evenly spaced over the schedule, and all others its last timestep.
        """
        count, last = self.num_timesteps_cond, self.num_timesteps - 1
        if count > self.num_timesteps:
            raise UserError(f"num_timesteps_cond {count}: must not be more than timesteps, {self.num_timesteps}")
        self.cond_ids = torch.full((self.num_timesteps,), last, dtype=torch.long)
        self.cond_ids[:count] = torch.linspace(0, last, count).round().long()
