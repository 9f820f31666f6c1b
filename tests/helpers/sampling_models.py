"""Tiny models for samplers, one of them with a known solution."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.sampling.sampler import Sampler
from ldm.sampling.samplers import SAMPLERS, sampler_class
from ldm.sampling.schedule import diffusion_buffers, q_sample

SHAPE = (2, 6, 6)
SAMPLER_CLASSES: dict[str, type[Sampler]] = {name: sampler_class(name) for name in SAMPLERS}
DETERMINISTIC = tuple(name for name, cls in SAMPLER_CLASSES.items() if not cls.supports_eta)


class TinyModel(nn.Module):
    """The part of a LatentDiffusion that a sampler uses.

    Args:
        network: (x, t, cond) -> output.
        parameterization: what the output is: "eps", "v" or "x0".
        timesteps: of the noise schedule.
        zero_terminal_snr: whether the schedule ends in pure noise.

    Attributes:
        calls: the arguments of all calls of `apply_model`.
    """

    def __init__(self, network: Callable[..., Tensor], parameterization: str = "eps", timesteps: int = 1000,
                 zero_terminal_snr: bool = False) -> None:
        super().__init__()
        buffers = diffusion_buffers("linear", timesteps, 0.00085, 0.012, zero_terminal_snr=zero_terminal_snr)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.num_timesteps, self.parameterization, self.network = timesteps, parameterization, network
        self.calls: list[tuple[Tensor, Tensor, object]] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.calls.append((x, t, cond))
        return self.network(x, t, cond)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Return alpha_bar(t), (B, 1, 1, 1) in float64, for integer and fractional t, (B,)."""
        sigmas = ((1 - self.alphas_cumprod.double()) / self.alphas_cumprod.double()).sqrt()
        between = np.interp(t.double(), np.arange(len(sigmas)), sigmas.log())
        return 1 / (1 + torch.from_numpy(between).mul(2).exp()).view(-1, 1, 1, 1)


class FamilyTinyModel(TinyModel):
    """A tiny model with the methods that the LDM family's samplers call."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        return q_sample(self, x_start, t, torch.randn_like(x_start) if noise is None else noise)


def seeded_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start_noise(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=seeded_generator(seed))


WEIGHT = torch.randn(2, 2, 3, 3, generator=seeded_generator(11)) * 0.3


def convolution_network(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    """A smooth network whose output depends on all its inputs."""
    clock = torch.sin(t.float() / 150).view(-1, 1, 1, 1)
    text = 0 if cond is None else cond.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(F.conv2d(x, WEIGHT, padding=1) + clock + text)


def gaussian_denoiser(mean: float | Tensor, std: float, parameterization: str = "eps", timesteps: int = 1000,
                      zero_terminal_snr: bool = False) -> TinyModel:
    """Return the exact denoiser of independent pixels N(mean, std^2); with std 0, it always predicts `mean`."""

    def network(x: Tensor, t: Tensor, cond: object) -> Tensor:
        alpha_bar = model.alpha_bar(t)
        x0 = (mean * (1 - alpha_bar) + std**2 * alpha_bar.sqrt() * x) / (std**2 * alpha_bar + 1 - alpha_bar)
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        return {"eps": eps, "v": v, "x0": x0}[parameterization].float()

    model = TinyModel(network, parameterization, timesteps, zero_terminal_snr)
    return model
