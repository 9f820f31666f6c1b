"""What the samplers share: a grid of times, a guided denoiser, a source of noise, and the loop that walks the grid.

A sampler proper is a `Step`: a function from (x, place on the grid) to (x one place on, its guess of the final image).
Steps see the model only through a `Denoiser`. Guidance is Ho & Salimans 2022, eq. 6, with a scale of 1 + w: 1 is none.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor
from tqdm import trange

from ldm.errors import UserError
from ldm.models.diffusion.schedule import NoiseSchedule, Prediction, check_parameterization, q_sample, read_output
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.util import make_ddim_timesteps

Conditioning = Tensor | PromptContext
Denoiser = Callable[[Tensor, int], Prediction]
NoiseSource = Callable[[], Tensor]
Step = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class DiffusionModel(NoiseSchedule, Protocol):
    """What a sampler needs of a model: its schedule, what its output means, and the output itself."""

    num_timesteps: int
    parameterization: str
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        """The network's output on x (B, C, H, W) at the steps t (B,)."""


@dataclass(frozen=True)
class TimeGrid:
    """The times that sampling visits, noisiest first; `kept` is a(t) there, `kept_after` a(t) where the step leads."""

    times: tuple[int, ...]
    kept: tuple[float, ...]
    kept_after: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.times)


def time_grid(model: DiffusionModel, steps: int) -> TimeGrid:
    """`steps` evenly spaced times of the model's schedule; the last step leads to the time just before the last one.

    Raises:
        UserError: `steps` is not within 1..num_timesteps.
    """
    times = make_ddim_timesteps("uniform", steps, model.num_timesteps)[::-1].tolist()
    kept = model.alphas_cumprod.cpu()[times].tolist()
    last = model.alphas_cumprod_prev[times[-1]].item()
    return TimeGrid(tuple(times), tuple(kept), (*kept[1:], last))


def noise_source(size: Sequence[int], device: torch.device, generators: Sequence[Generator] | None) -> NoiseSource:
    """A function that draws standard normal noise of `size` (B, ...), anew at each call.

    With generators, image i takes its noise from the i-th alone and so does not depend on its neighbours. The noise is
    drawn where the generator lives: generators on the CPU give the same images on every device.

    Raises:
        UserError: there are not as many generators as images.
    """
    if generators is None:
        return partial(torch.randn, tuple(size), device=device)
    if len(generators) != size[0]:
        raise UserError(f"{len(generators)} generators for {size[0]} images; give one for each image")

    def draw() -> Tensor:
        return torch.stack([torch.randn(size[1:], generator=g, device=g.device).to(device) for g in generators])

    return draw


def guidance_batch(unconditional: Conditioning, conditional: Conditioning) -> Conditioning:
    """Both conditionings (B, ...) in one batch (2B, ...), the unconditional one first.

    Beside a `PromptContext`, a plain tensor counts as prompts without concepts.
    """
    parts = [unconditional, conditional]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(parts)
    return PromptContext.cat([PromptContext.plain(part) if isinstance(part, Tensor) else part for part in parts])


def guided_denoiser(
    model: DiffusionModel, conditioning: Conditioning | None, unconditional: Conditioning | None, scale: float
) -> Denoiser:
    """The model as a function of (x, time): `scale` of the way from its unconditional to its conditional output.

    At scale 1 the unconditional output drops out and is not computed. The batch of both conditionings is built here,
    once, so that what it caches serves every step. The three parameterizations are affine in each other at a fixed x,
    so guiding the raw output guides each of them.
    """
    guided = scale != 1
    context = guidance_batch(unconditional, conditioning) if guided else conditioning
    if isinstance(context, PromptContext):
        context = replace(context, cache=True)  # a copy: weights may change before its owner uses it again

    def denoise(x: Tensor, time: int) -> Prediction:
        times = torch.full((len(x),), time, device=x.device, dtype=torch.long)
        if guided:
            both = model.apply_model(torch.cat([x, x]), torch.cat([times, times]), context)
            output = torch.lerp(*both.chunk(2), scale)
        else:
            output = model.apply_model(x, times, context)
        return read_output(model, model.parameterization, x, times, output)

    return denoise


def inpainting(model: DiffusionModel, x0: Tensor, mask: Tensor, draw: NoiseSource) -> Callable[[Tensor, int], Tensor]:
    """A function of (x, time) that puts a noised `x0` in place of x where the mask is 1."""

    def restore(x: Tensor, time: int) -> Tensor:
        times = torch.full((len(x),), time, device=x.device, dtype=torch.long)
        return torch.lerp(x, q_sample(model, x0, times, draw()), mask)

    return restore


def walk(
    step: Step, x: Tensor, steps: int, *, log_every_t: int, verbose: bool,
    callback: Callable[[int], None] | None, img_callback: Callable[[Tensor, int], None] | None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Takes all steps of a grid; returns the last x and what was kept along the way (see `Sampler.sample`)."""
    kept = {"x_inter": [x], "pred_x0": [x]}
    for i in trange(steps, desc="sampling", disable=not verbose):
        x, pred_x0 = step(x, i)
        if callback is not None:
            callback(i)
        if img_callback is not None:
            img_callback(pred_x0, i)
        if i == 0 or (steps - 1 - i) % log_every_t == 0:
            kept["x_inter"].append(x)
            kept["pred_x0"].append(pred_x0)
    return x, kept


class Sampler(ABC):
    """A model together with a way of walking from noise to an image."""

    def __init__(self, model: DiffusionModel) -> None:
        check_parameterization(model.parameterization)
        self.model = model

    @abstractmethod
    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, draw: NoiseSource) -> Step:
        """The sampler proper on this grid; `draw` is where it takes the noise that `eta` asks for."""

    def check_eta(self, eta: float) -> None:
        """Raises a UserError where this sampler cannot work with `eta`."""
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta} must lie between 0 (no noise added) and 1 (as much as DDPM)")

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning | None = None,
        *,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        generators: Sequence[Generator] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draws `batch_size` latents.

        Args:
            S: how many steps, 1..num_timesteps.
            shape: (C, H, W) of one latent.
            conditioning: (batch_size, N, d), encoded prompts; None for a model without conditioning.
            callback: called after each step with its number i, 0..S-1.
            img_callback: called after each step with the guess of the final latents (batch_size, C, H, W) and i.
            eta: 0..1, the share of DDPM's noise that is added at each step.
            mask: broadcasts to (batch_size, C, H, W); where it is 1, the latents follow `x0`.
            x0: (batch_size, C, H, W), the latents to keep; goes with `mask`.
            temperature: scales the noise of `eta`.
            verbose: shows a progress bar.
            x_T: (batch_size, C, H, W), the noise to start from; drawn where None.
            log_every_t: keep every so many steps, counted from the last, in the intermediates.
            unconditional_guidance_scale: 1 means no guidance.
            unconditional_conditioning: of the same shape as `conditioning`; needed unless the scale is 1.
            generators: one per image, the sources of all noise of that image; the global one where None.

        Returns:
            The latents (batch_size, C, H, W), and {"x_inter", "pred_x0"}: the start noise, then after the first step,
            every `log_every_t` steps and the last one the latents, and the guesses of the final latents.

        Raises:
            UserError: an argument is out of its range or does not fit the others. Nothing has been computed then.
        """
        grid = time_grid(self.model, S)
        self.check_eta(eta)
        if log_every_t < 1:
            raise UserError(f"log_every_t {log_every_t} must be 1 or more")
        size = _latent_size(batch_size, shape)
        _check_noise(size, eta, temperature, x_T)
        _check_guidance(batch_size, conditioning, unconditional_conditioning, unconditional_guidance_scale)
        _check_inpainting(size, mask, x0)
        device = self.model.betas.device
        draw = noise_source(size, device, generators)

        denoise = guided_denoiser(self.model, conditioning, unconditional_conditioning, unconditional_guidance_scale)
        step = self.make_step(denoise, grid, eta, lambda: temperature * draw())
        if mask is not None:
            step = _preceded(step, grid, inpainting(self.model, x0.to(device), mask.to(x0).to(device), draw))
        start = draw() if x_T is None else x_T.to(device)
        return walk(
            step, start, S, log_every_t=log_every_t, verbose=verbose, callback=callback, img_callback=img_callback
        )


def _preceded(step: Step, grid: TimeGrid, before: Callable[[Tensor, int], Tensor]) -> Step:
    return lambda x, i: step(before(x, grid.times[i]), i)


def _latent_size(batch_size: int, shape: Sequence[int]) -> tuple[int, ...]:
    size = (batch_size, *shape)
    if len(size) != 4 or min(size) < 1:
        raise UserError(f"cannot sample {batch_size} latents of shape {tuple(shape)}: give 1 or more, of (C, H, W)")
    return size


def _check_noise(size: tuple[int, ...], eta: float, temperature: float, x_T: Tensor | None) -> None:
    if temperature < 0:
        raise UserError(f"temperature {temperature} must be 0 or more")
    if temperature != 1 and eta == 0:
        raise UserError(f"temperature {temperature} scales the noise of eta, which is 0; raise eta or leave it out")
    if x_T is not None and tuple(x_T.shape) != size:
        raise UserError(f"x_T has shape {tuple(x_T.shape)}, but the latents have {size}")


def _check_guidance(
    batch_size: int, conditioning: Conditioning | None, unconditional: Conditioning | None, scale: float
) -> None:
    if conditioning is not None and conditioning.shape[0] != batch_size:
        raise UserError(f"conditioning for {conditioning.shape[0]} images, but batch_size is {batch_size}")
    if scale == 1:
        return
    if conditioning is None or unconditional is None:
        raise UserError(f"unconditional_guidance_scale {scale} needs conditioning and unconditional_conditioning")
    if tuple(conditioning.shape) != tuple(unconditional.shape):
        shapes = f"{tuple(unconditional.shape)} and {tuple(conditioning.shape)}"
        raise UserError(f"unconditional_conditioning and conditioning differ in shape, {shapes}; encode them alike")


def _check_inpainting(size: tuple[int, ...], mask: Tensor | None, x0: Tensor | None) -> None:
    if (mask is None) != (x0 is None):
        raise UserError("mask and x0 belong together: give both or neither")
    if mask is None or x0 is None:
        return
    if tuple(x0.shape) != size:
        raise UserError(f"x0 has shape {tuple(x0.shape)}, but the latents have {size}")
    if mask.ndim > 4 or any(have not in (1, want) for have, want in zip(mask.shape[::-1], size[::-1], strict=False)):
        raise UserError(f"mask of shape {tuple(mask.shape)} does not broadcast to the latents' {size}")
