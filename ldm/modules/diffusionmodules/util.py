"""Building blocks that U-Net and autoencoder share, noise schedules, and the step tables of DDIM."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ldm.common.errors import UserError

Module = TypeVar("Module", bound=nn.Module)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORM_GROUPS = 32


# ---------------------------------------------------------------------------------------------------------------------
# Noise schedules. beta_t is the variance added at step t of T; alpha_bar_t = prod_{s<=t} (1 - beta_s).

def _cosine_betas(steps: int, offset: float, largest: float = 0.999) -> np.ndarray:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17: alpha_bar follows a squared cosine."""
    phase = (np.arange(steps + 1, dtype=np.float64) / steps + offset) / (1 + offset) * np.pi / 2
    alpha_bar = np.cos(phase) ** 2
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, largest)


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """beta_1 ... beta_T in float64, shape (n_timestep,).

    Args:
        schedule: "linear" (the square root of beta is what grows linearly, as latent diffusion has it), "sqrt_linear"
            (beta itself grows linearly, the DDPM paper's schedule), "sqrt" (square roots of those) or "cosine".
        linear_start, linear_end: the first and the last beta; "cosine" does not read them.
        cosine_s: the offset that keeps the first betas of "cosine" away from zero.

    Raises:
        UserError: the schedule is none of the four.
    """
    tables: dict[str, Callable[[], np.ndarray]] = {
        "linear": lambda: np.linspace(math.sqrt(linear_start), math.sqrt(linear_end), n_timestep) ** 2,
        "sqrt_linear": lambda: np.linspace(linear_start, linear_end, n_timestep),
        "sqrt": lambda: np.sqrt(np.linspace(linear_start, linear_end, n_timestep)),
        "cosine": lambda: _cosine_betas(n_timestep, cosine_s),
    }
    if schedule not in tables:
        raise UserError(f"beta schedule {schedule!r} is unknown; choose one of {', '.join(sorted(tables))}")
    return tables[schedule]()


def make_ddim_timesteps(ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int) -> np.ndarray:
    """The S of the T training timesteps that DDIM visits, ascending, shape (S,), each in 0 .. T-1.

    "uniform" spaces them evenly, "quad" quadratically over the first 80 % (Song et al. 2020, arXiv:2010.02502,
    appendix D.2). They are moved up by one, as in latent diffusion, unless that would leave the schedule: every S up
    to T is possible, whether or not it divides T.

    Raises:
        UserError: the method is unknown, or S is not within 1 .. T.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise UserError(f"{num_ddim_timesteps} sampling steps: give a number from 1 to {num_ddpm_timesteps}")
    if ddim_discr_method == "uniform":
        steps = np.arange(num_ddim_timesteps) * num_ddpm_timesteps // num_ddim_timesteps
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, math.sqrt(0.8 * num_ddpm_timesteps), num_ddim_timesteps) ** 2).astype(int)
    else:
        raise UserError(f"DDIM discretization {ddim_discr_method!r} is unknown; choose uniform or quad")
    return steps + 1 if steps[-1] + 1 < num_ddpm_timesteps else steps


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """`a[t]` for timesteps t (B,), shaped (B, 1, ..., 1) to broadcast against a tensor of shape `x_shape`."""
    return a[t].view(-1, *[1] * (len(x_shape) - 1))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of the timesteps: (B,), fractions allowed, to (B, dim) in float32; cosines first, then sines.

    Frequencies fall geometrically from 1 to 1/max_period (Vaswani et al. 2017, section 3.5); an odd `dim` is padded
    with a zero column.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float().unsqueeze(1) * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))


# ---------------------------------------------------------------------------------------------------------------------
# Layers.

class GroupNorm32(nn.GroupNorm):
    """Group normalization whose sums are float32 whatever the input is; gives the input's dtype back."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # of 16 bits, too, torch adds up in 32
            return super().forward(x)
        scaled = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return scaled.to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The norm of the residual blocks: 32 groups, epsilon 1e-5."""
    return GroupNorm32(NORM_GROUPS, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial dimensions; all else as torch.nn.ConvNd takes it."""
    return CONVOLUTIONS[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling over `dims` (1, 2 or 3) spatial dimensions; all else as torch.nn.AvgPoolNd takes it."""
    return AVERAGE_POOLS[dims](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A torch.nn.Linear."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: Module) -> Module:
    """Sets all parameters of `module` to zero, so that its residual branch starts as nothing; returns it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def checkpoint(function: Callable[..., Tensor], *inputs: Any, flag: bool) -> Tensor:
    """`function(*inputs)`, its activations recomputed in the backward pass when `flag` is set and gradients are on.

    Inputs need not be tensors, and frozen parameters or tensors that arrive by closure keep their proper gradients.
    """
    if flag and torch.is_grad_enabled():
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return recompute_in_backward(function, *inputs, use_reentrant=False,
                                     preserve_rng_state=not captured)  # a graph cannot ask for it
    return function(*inputs)
