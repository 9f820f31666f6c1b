"""Noise schedules, the timesteps of DDIM, and the building blocks of the U-Net."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ldm.common.errors import UserError
from ldm.util import instantiate_from_config, mean_flat

__all__ = [
    "NORM_GROUPS", "GroupNorm32", "HybridConditioner", "SiLU", "avg_pool_nd", "betas_for_alpha_bar", "checkpoint",
    "conv_nd", "ddim_sigma", "extract_into_tensor", "linear", "make_beta_schedule", "make_ddim_sampling_parameters",
    "make_ddim_timesteps", "mean_flat", "noise_like", "normalization", "scale_module", "timestep_embedding",
    "zero_module",
]
Module = TypeVar("Module", bound=nn.Module)
FloatOrArray = TypeVar("FloatOrArray", float, np.ndarray)

SiLU = nn.SiLU
log = logging.getLogger(__name__)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORM_GROUPS = 32


# ---------------------------------------------------------------------------------------------------------------------
# Noise schedules. beta_t is the variance that step t of T adds; alpha_bar_t = prod_{s<=t} (1 - beta_s).

def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Return the betas, at most `max_beta`, of a given alpha_bar, a function of the time t / T from 0 to 1; (T,)."""
    values = np.array([alpha_bar(t / num_diffusion_timesteps) for t in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - values[1:] / values[:-1], max_beta)


def _cosine_betas(steps: int, offset: float = 8e-3) -> np.ndarray:
    """Return the betas of which alpha_bar is a squared cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17)."""
    return betas_for_alpha_bar(steps, lambda t: math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2)


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Compute beta_1 ... beta_T.

    Args:
        schedule: "linear" (the square root of beta is linear in t, as in latent diffusion), "sqrt_linear" (beta is
            linear in t, as in the DDPM paper), "sqrt" (beta is the square root of a linear function), "cosine", or
            "squaredcos_cap_v2" (the same with an offset of 0.008).
        n_timestep: T.
        linear_start, linear_end: first and last beta; "cosine" ignores them.
        cosine_s: offset that keeps the first betas of "cosine" away from zero.

    Returns:
        (T,) float64

    Raises:
        UserError: if the schedule is none of these.
    """
    tables: dict[str, Callable[[], np.ndarray]] = {
        "linear": lambda: np.linspace(math.sqrt(linear_start), math.sqrt(linear_end), n_timestep) ** 2,
        "sqrt_linear": lambda: np.linspace(linear_start, linear_end, n_timestep),
        "sqrt": lambda: np.sqrt(np.linspace(linear_start, linear_end, n_timestep)),
        "cosine": lambda: _cosine_betas(n_timestep, cosine_s),
        "squaredcos_cap_v2": lambda: _cosine_betas(n_timestep),
    }
    if schedule not in tables:
        raise UserError(f"beta schedule {schedule!r} is unknown; choose one of {', '.join(sorted(tables))}")
    return tables[schedule]()


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Choose the timesteps that the LDM family's DDIM visits.

    An S that does not divide T gives more than S of them. `ldm.sampling.time_grid.leading_grid` gives exactly S.

    Args:
        ddim_discr_method: "uniform" for every (T // S)-th timestep, or "quad" for S of them, spaced quadratically over
            the first 80 %.
        num_ddim_timesteps: S.
        num_ddpm_timesteps: T.
        verbose: whether to log the timesteps.

    Returns:
        Integers from 1, ascending; T itself, which no schedule has, is the last one if S is more than T / 2.

    Raises:
        UserError: if the method is unknown, or S is not from 1 to T.

    Source: Song et al. 2020 (arXiv:2010.02502), appendix D.2.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise UserError(f"{num_ddim_timesteps} sampling steps: give a number from 1 to {num_ddpm_timesteps}")
    if ddim_discr_method == "uniform":
        steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, math.sqrt(0.8 * num_ddpm_timesteps), num_ddim_timesteps) ** 2).astype(int)
    else:
        raise UserError(f"DDIM discretization {ddim_discr_method!r} is unknown; choose uniform or quad")
    if verbose:
        log.info("timesteps of DDIM: %s", steps + 1)
    return steps + 1


def make_ddim_sampling_parameters(
    alphacums: Tensor | np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple[Tensor | np.ndarray, Tensor | np.ndarray, np.ndarray]:
    """Return the noise levels of DDIM's steps as the LDM family has them.

    Args:
        alphacums: alpha_bar of all timesteps, (T,), on the CPU.
        ddim_timesteps: (S,) integers below T, ascending.
        eta: share of DDPM's noise in each step.
        verbose: whether to log the tables.

    Returns:
        sigma of the noise that each step adds (S,) in float64, and alpha_bar before and after each step (S,). The last
        one is a float64 array, the first two have the type of `alphacums`.
    """
    alphas = alphacums[ddim_timesteps]
    alphas_prev = np.append(alphacums[:1], alphacums[ddim_timesteps[:-1]]).astype(np.float64)
    sigmas = ddim_sigma(np.asarray(alphas, dtype=np.float64), alphas_prev, eta)
    if verbose:
        log.info("alpha_bar of DDIM's steps: %s, after them: %s, sigma at eta %g: %s", alphas, alphas_prev, eta, sigmas)
    return torch.from_numpy(sigmas) if isinstance(alphacums, Tensor) else sigmas, alphas, alphas_prev


def ddim_sigma(alpha_bar: FloatOrArray, alpha_bar_next: FloatOrArray, eta: float) -> FloatOrArray:
    """Return the standard deviation of the noise that a step adds (Song et al. 2020, eq. 16)."""
    return eta * np.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Return standard normal noise of `shape`; with `repeat`, the same for all samples of the batch."""
    if not repeat:
        return torch.randn(tuple(shape), device=device)
    return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *[1] * (len(shape) - 1))


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return `a[t]` for timesteps t (B,), shaped (B, 1, ..., 1) so that it broadcasts to `x_shape`."""
    return a[t].view(-1, *[1] * (len(x_shape) - 1))


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> Tensor:
    """Embed timesteps by sinusoids whose frequencies fall geometrically from 1 to 1/max_period.

    Args:
        timesteps: (B,), not necessarily integers.
        dim: width of the embedding.
        repeat_only: whether to repeat the timesteps instead.

    Returns:
        (B, dim) float32: the cosines, then the sines, then a zero if `dim` is odd. With `repeat_only` (B, dim) of the
        timesteps' dtype.

    Source: Vaswani et al. 2017, section 3.5.
    """
    if repeat_only:
        return timesteps.unsqueeze(1).repeat(1, dim)
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float().unsqueeze(1) * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


# ---------------------------------------------------------------------------------------------------------------------
# Layers.

class GroupNorm32(nn.GroupNorm):
    """Group normalization with statistics in float32. The result has the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # torch computes the statistics of 16-bit inputs in float32, too
            return super().forward(x)
        normalized = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normalized.to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Return the norm of the residual blocks, with 32 groups and epsilon 1e-5."""
    return GroupNorm32(NORM_GROUPS, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a convolution over 1, 2 or 3 spatial dimensions; the other arguments are those of `torch.nn.Conv2d`."""
    return CONVOLUTIONS[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return an average pooling over 1, 2 or 3 dimensions; the other arguments are those of `torch.nn.AvgPool2d`."""
    return AVERAGE_POOLS[dims](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Return a `torch.nn.Linear`."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: Module) -> Module:
    """Set all parameters of `module` to zero, so that its residual branch starts at zero, and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def scale_module(module: Module, scale: float) -> Module:
    """Multiply all parameters of `module` by `scale`, and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


class HybridConditioner(nn.Module):
    """Encode one condition to concatenate with the latents and one for cross-attention.

    Args:
        c_concat_config, c_crossattn_config: configs of the two encoders.
    """

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        """Return the encoded conditions as `ldm.models.diffusion.wrapper.DiffusionWrapper` reads them."""
        return {"c_concat": [self.concat_conditioner(c_concat)],
                "c_crossattn": [self.crossattn_conditioner(c_crossattn)]}


def checkpoint(
    func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[nn.Parameter] = (), flag: bool = True
) -> Any:
    """Call `func(*inputs)`. If `flag` is set, recompute its activations in the backward pass to save memory.

    Args:
        func: a function of tensors and other values.
        inputs: its arguments.
        params: the parameters that it closes over, as the LDM family's callers name them. They are not needed: frozen
            parameters, and all tensors that the function closes over, get the right gradients.
        flag: whether to recompute.
    """
    if not (flag and torch.is_grad_enabled()):
        return func(*inputs)
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    # The state of the random generator cannot be read while a CUDA graph is captured.
    return recompute_in_backward(func, *inputs, use_reentrant=False, preserve_rng_state=not capturing)
