"""The noise schedule as named tensors, and conversions between what a network may predict: noise, image, velocity.

Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (cosine schedule), Salimans & Ho 2022 (v-prediction), Lin et al.
2023 (zero terminal SNR).

Legend, with alpha_bar the share of the image's variance that is left at timestep t:
    alphas_cumprod                  alpha_bar of all timesteps, the products of 1 - betas
    q(x_t | x_0)                    N(sqrt(alpha_bar) x_0, 1 - alpha_bar)                         DDPM Eq. 4
    eps                             the noise in x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
    v                               sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0                 Salimans & Ho, Sec. 4
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule

PARAMETERIZATIONS = ("eps", "v", "x0")
PURE_NOISE = 1e-6  # an alpha_bar below which eps says next to nothing about the image; the cosine schedule ends below
AlphaBar = float | Tensor  # in [0, 1]; a tensor broadcasts to (B, ...)


class NoiseSchedule(Protocol):
    """Any object with the tensors that the conversions read, such as a model that registered `diffusion_buffers`."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor


class Prediction(NamedTuple):
    """A network's prediction at x_t: the noise in it and the image behind it, both (B, ...)."""

    eps: Tensor
    x0: Tensor


def check_parameterization(name: str) -> None:
    """Raise UserError unless `name` is a known parameterization."""
    if name not in PARAMETERIZATIONS:
        raise UserError(f"parameterization {name!r} is unknown; choose one of {', '.join(PARAMETERIZATIONS)}")


# The schedule


def diffusion_buffers(
    beta_schedule: str,
    timesteps: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    given_betas: Sequence[float] | Tensor | None = None,
    v_posterior: float = 0.0,
    zero_terminal_snr: bool = False,
) -> dict[str, Tensor]:
    """Return all tensors of the schedule by buffer name, each (timesteps,) in float32, computed in float64.

    Args:
        beta_schedule: a name that `make_beta_schedule` knows; ignored if `given_betas` is not None.
        given_betas: betas in (0, 1) to use instead; their number replaces `timesteps`.
        v_posterior: 0..1, interpolates the variance of the reverse step between its lower bound, the posterior's
            variance, and its upper bound, beta (DDPM Sec. 3.2).
        zero_terminal_snr: change the schedule so that it ends in pure noise, see `rescale_to_zero_terminal_snr`. The
            last entries of sqrt_recip_alphas_cumprod and sqrt_recipm1_alphas_cumprod are infinite then.

    Raises:
        UserError: if there are fewer than two betas, one is outside (0, 1), or `v_posterior` is outside 0..1.
    """
    if given_betas is None:
        if timesteps < 2:
            raise UserError(f"timesteps {timesteps}: a noise schedule has two or more; 1000 is usual")
        given_betas = make_beta_schedule(
            beta_schedule, timesteps, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s
        )
    betas = torch.as_tensor(given_betas, dtype=torch.float64, device="cpu").detach()
    _check_betas(betas)
    if not 0 <= v_posterior <= 1:
        raise UserError(f"v_posterior {v_posterior} must be between 0 and 1")
    if zero_terminal_snr:
        betas = rescale_to_zero_terminal_snr(betas)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    tensors = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        **marginal_tensors(alpha_bar),
        **_posterior_tensors(betas, alpha_bar, alpha_bar_prev, v_posterior),
    }
    return {name: tensor.float() for name, tensor in tensors.items()}


def _check_betas(betas: Tensor) -> None:
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError("the betas must be two or more numbers between 0 and 1; check the noise schedule's settings")


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas (T,) of a schedule whose last alpha_bar is 0; the first one stays. The last beta is 1.

    Source: Lin, Liu, Li & Yang 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Algorithm 1.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    # Shift the last sqrt(alpha_bar) to 0, then scale the first one back to what it was.
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def check_terminal_snr(alpha_bar: Tensor, parameterization: str) -> None:
    """Raise UserError if a network would have to predict noise (eps) where there is nothing else.

    Args:
        alpha_bar: of all timesteps, (T,).
    """
    if parameterization == "eps" and alpha_bar[-1] == 0:
        raise UserError("zero_terminal_snr: the last timestep is pure noise, where eps says nothing about the image; "
                        "use a model with parameterization: v")


def marginal_tensors(alpha_bar: Tensor) -> dict[str, Tensor]:
    """Return the coefficients of q(x_t | x_0), and of its inversion for x_0."""
    return {
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
    }


def _posterior_tensors(betas: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, v_posterior: float
                       ) -> dict[str, Tensor]:
    """Return mean and variance of q(x_{t-1} | x_t, x_0), DDPM Eq. 7.

    The first variance is 0, so its logarithm is clipped.
    """
    lower_bound = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
    variance = torch.lerp(lower_bound, betas, v_posterior)
    return {
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
    }


def lvlb_weights(buffers: Mapping[str, Tensor], parameterization: str) -> Tensor:
    """Return (timesteps,) weights of a prediction's squared error in `loss_vlb`, as latent diffusion has them.

    For eps they are those of the variational bound (DDPM Eq. 12). For x0 they are sqrt(alpha_bar) / (2 (2 - alpha_bar))
    and for v 1: the public code never derived a bound there, and its runs use these. The first timestep has no
    variance and takes the weight of the second.

    Raises:
        UserError: if the parameterization is unknown.
    """
    check_parameterization(parameterization)
    exact = {name: tensor.double() for name, tensor in buffers.items()}
    if parameterization == "eps":
        errors_of_x0 = exact["posterior_mean_coef1"] * exact["sqrt_recipm1_alphas_cumprod"]
        weights = errors_of_x0**2 / (2 * exact["posterior_variance"])
    elif parameterization == "x0":
        weights = exact["sqrt_alphas_cumprod"] / (2 * (2 - exact["alphas_cumprod"]))
    else:
        weights = torch.ones_like(exact["betas"])
    return torch.cat([weights[1:2], weights[1:]]).float()


# Training: x_t and v at random timesteps


def q_sample(schedule: NoiseSchedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return x_t of DDPM Eq. 4 from x_0 (B, ...), noise of the same shape, and timesteps t (B,)."""
    return _linear_combination(
        t, (schedule.sqrt_alphas_cumprod, x_start), (schedule.sqrt_one_minus_alphas_cumprod, noise)
    )


def get_v(schedule: NoiseSchedule, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return v from x_0 (B, ...), eps and timesteps t (B,)."""
    return _linear_combination(
        t, (schedule.sqrt_alphas_cumprod, noise), (-schedule.sqrt_one_minus_alphas_cumprod, x_start)
    )


def _linear_combination(t: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum of tensors (B, ...), each multiplied by its coefficient at the timesteps t (B,)."""
    return sum(extract_into_tensor(coefficients, t, tensor.shape) * tensor for coefficients, tensor in terms)


# Sampling: conversions at a known alpha_bar


def add_noise(prediction: Prediction, alpha_bar: AlphaBar) -> Tensor:
    """Return x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (DDPM Eq. 4)."""
    return alpha_bar**0.5 * prediction.x0 + (1 - alpha_bar) ** 0.5 * prediction.eps


def prediction_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: AlphaBar) -> Prediction:
    """Return the prediction that contains the noise `eps` of x_t (B, ...)."""
    return Prediction(eps, (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5)


def prediction_from_x0(x_t: Tensor, x0: Tensor, alpha_bar: AlphaBar) -> Prediction:
    """Return the prediction that contains the image `x0` behind x_t (B, ...)."""
    return Prediction((x_t - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5, x0)


def prediction_from_v(x_t: Tensor, v: Tensor, alpha_bar: AlphaBar) -> Prediction:
    """Return the prediction that corresponds to the velocity `v` at x_t (B, ...)."""
    eps = alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x_t
    x0 = alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * v
    return Prediction(eps, x0)


def prediction_from_output(parameterization: str, x_t: Tensor, alpha_bar: AlphaBar, output: Tensor) -> Prediction:
    """Return the prediction that a network's `output` (B, ...) at x_t means.

    Raises:
        UserError: if the parameterization is unknown.
    """
    check_parameterization(parameterization)
    conversions = {"eps": prediction_from_eps, "v": prediction_from_v, "x0": prediction_from_x0}
    return conversions[parameterization](x_t, output, alpha_bar)
