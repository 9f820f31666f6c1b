"""What the users' scripts must give: the family's formulas in plain torch, with its order of random numbers.

They read nothing of a model but its U-Net, as a function of x, t and a condition, and its table of alpha_bar.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


def guided(model: Any, cond: Tensor | None, uncond: Tensor | None = None, scale: float = 1.0,
           concat: Tensor | None = None) -> Network:
    """Return eps(x, t) of the U-Net, by classifier-free guidance if there is an unconditional condition."""
    unet = model.model.diffusion_model

    def eps(x: Tensor, t: Tensor) -> Tensor:
        seen = x if concat is None else torch.cat([x, concat], 1)
        if uncond is None or scale == 1.0:
            return unet(seen, t, context=cond)
        without = unet(seen, t, context=uncond)
        return without + scale * (unet(seen, t, context=cond) - without)

    return eps


def ddim_steps(count: int, total: int = 1000) -> list[int]:
    """Return the family's timesteps: every (total // count)-th, shifted by one. They may be more than `count`."""
    return [t + 1 for t in range(0, total, total // count)]


def _noise_levels(model: Any, steps: list[int]) -> list[tuple[int, float, float]]:
    """Return (t, alpha_bar, alpha_bar of the next step) from the noisiest step to the cleanest."""
    table = model.alphas_cumprod.double().tolist()
    before = [0, *steps[:-1]]
    return [(t, table[t], table[earlier]) for t, earlier in zip(reversed(steps), reversed(before), strict=True)]


def _ddim_update(x: Tensor, eps: Tensor, now: float, then: float, eta: float = 0.0) -> Tensor:
    """DDIM, eq. 12. A number is drawn for each position at eta 0 too."""
    sigma = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
    return np.sqrt(then) * x0 + np.sqrt(1 - then - sigma**2) * eps + sigma * torch.randn(x.shape)


def ddim(model: Any, eps: Network, x: Tensor, steps: list[int], eta: float = 0.0) -> Tensor:
    for t, now, then in _noise_levels(model, steps):
        x = _ddim_update(x, eps(x, torch.full((len(x),), t)), now, then, eta)
    return x


def plms(model: Any, eps: Network, x: Tensor, steps: list[int]) -> Tensor:
    """PNDM's linear multistep method; its first step looks ahead, which draws noise once more."""
    history: list[Tensor] = []
    levels = _noise_levels(model, steps)
    for index, (t, now, then) in enumerate(levels):
        here = eps(x, torch.full((len(x),), t))
        if not history:
            following = levels[min(index + 1, len(levels) - 1)][0]
            ahead = eps(_ddim_update(x, here, now, then), torch.full((len(x),), following))
            used = (here + ahead) / 2
        elif len(history) == 1:
            used = (3 * here - history[-1]) / 2
        elif len(history) == 2:
            used = (23 * here - 16 * history[-1] + 5 * history[-2]) / 12
        else:
            used = (55 * here - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]) / 24
        x = _ddim_update(x, used, now, then)
        history = [*history, here][-3:]
    return x


def dpm_solver(model: Any, eps: Network, x: Tensor, count: int) -> Tensor:
    """DPM-Solver++(2M) on times equally spaced from 1 to 1/T; its last step is of first order (below 15 steps)."""
    table = model.alphas_cumprod.double().numpy()
    grid = np.arange(1, len(table) + 1) / len(table)
    times = np.linspace(1, 1 / len(table), count + 1)
    log_alpha = np.interp(times, grid, 0.5 * np.log(table))
    alpha, sigma = np.exp(log_alpha), np.sqrt(1 - np.exp(2 * log_alpha))
    lam = log_alpha - np.log(sigma)
    last: Tensor | None = None
    for i in range(count):
        t = torch.full((len(x),), float((times[i] - 1 / len(table)) * 1000))
        x0 = (x - sigma[i] * eps(x, t)) / alpha[i]
        step = np.expm1(-(lam[i + 1] - lam[i]))
        slope = 0.0
        if last is not None and i < count - 1:
            slope = (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) * (x0 - last)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * step * (x0 + 0.5 * slope)
        last = x0
    return x


def markov_chain(model: Any, eps: Network, x: Tensor) -> Tensor:
    """DDPM, algorithm 2: all steps of training, with the posterior's variance."""
    table = model.alphas_cumprod.double().tolist()
    for t in reversed(range(len(table))):
        now, then = table[t], table[t - 1] if t else 1.0
        beta = 1 - now / then
        x0 = (x - np.sqrt(1 - now) * eps(x, torch.full((len(x),), t))) / np.sqrt(now)
        mean = beta * np.sqrt(then) / (1 - now) * x0 + (1 - then) * np.sqrt(now / then) / (1 - now) * x
        noise = torch.randn(x.shape)
        x = mean + np.sqrt(beta * (1 - then) / (1 - now)) * noise if t else mean
    return x


def noised(model: Any, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    alpha_bar = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def encoded(model: Any, images: Tensor) -> Tensor:
    """Return a sample of the autoencoder's posterior, times the scale factor, for images (B, 3, H, W)."""
    stage = model.first_stage_model
    mean, logvar = stage.quant_conv(stage.encoder(images.contiguous())).chunk(2, dim=1)
    return model.scale_factor * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape))


def decoded(model: Any, latents: Tensor) -> Tensor:
    stage = model.first_stage_model
    return stage.decoder(stage.post_quant_conv(latents / model.scale_factor))


def euler(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float]) -> Tensor:
    """Euler's method on dx/dsigma = (x - D(x)) / sigma."""
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (x - denoise(x, now)) / now * (then - now)
    return x


def denoised(model: Any, eps: Network, x: Tensor, sigma: float) -> Tensor:
    """Return x - sigma eps at the fractional timestep at which the model's noise level is sigma."""
    table = model.alphas_cumprod.double().numpy()
    logs = 0.5 * np.log((1 - table) / table)
    t = np.interp(np.log(sigma), logs, np.arange(len(table)))
    return x - sigma * eps(x / np.sqrt(sigma**2 + 1), torch.full((len(x),), float(t)))
