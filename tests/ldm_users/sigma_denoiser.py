"""A wrapper in the manner of k-diffusion: the model as a denoiser of x0 + sigma noise, and Euler's method on it."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SigmaDenoiser(nn.Module):
    """Denoise by `apply_model`, at continuous noise levels between those of the model's table."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner_model = model
        self.register_buffer("sigmas", ((1 - model.alphas_cumprod) / model.alphas_cumprod) ** 0.5)

    def time_of(self, sigma: Tensor) -> Tensor:
        """Return the fractional timestep of each sigma (B,), linear in log sigma."""
        logs = self.sigmas.log()
        above = torch.searchsorted(logs, sigma.log()).clamp(1, len(logs) - 1)
        share = (sigma.log() - logs[above - 1]) / (logs[above] - logs[above - 1])
        return above - 1 + share.clamp(0, 1)

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        wide = sigma.view(-1, 1, 1, 1)
        eps = self.inner_model.apply_model(x / (wide**2 + 1) ** 0.5, self.time_of(sigma), **kwargs)
        return x - wide * eps


class Guided(nn.Module):
    """Guidance in the manner of InstructPix2Pix: by a text and by a picture, each with its own scale."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z: Tensor, sigma: Tensor, cond: Any, uncond: Any, text_scale: float, image_scale: float
                ) -> Tensor:
        concat = [torch.cat([cond["c_concat"][0], cond["c_concat"][0], uncond["c_concat"][0]])]
        text = [torch.cat([cond["c_crossattn"][0], uncond["c_crossattn"][0], uncond["c_crossattn"][0]])]
        out = self.denoiser(torch.cat([z] * 3), torch.cat([sigma] * 3),
                            cond={"c_concat": concat, "c_crossattn": text})
        full, picture, none = out.chunk(3)
        return none + text_scale * (full - picture) + image_scale * (picture - none)


@torch.no_grad()
def euler(denoise: Any, x: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
    """Return the sample at the last sigma, which is 0."""
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, now.expand(len(x)), **kwargs)) / now
        x = x + slope * (then - now)
    return x
