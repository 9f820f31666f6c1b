"""What the samplers share: a guided denoiser, a source of noise, the step from one time to the next, and the walk.

A sampler proper is a grid of times and a way of refining the denoiser on it: what it takes to be the noise in x, and
the image behind it, for the whole of a step. All of them then take the step of DDIM, which is exact where those two
stay what they are. Guidance is Ho & Salimans 2022, eq. 6, with a scale of 1 + w: 1 is none.
"""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor
from tqdm import trange

from ldm.common.errors import UserError
from ldm.models.diffusion.schedule import Prediction, add_noise, check_parameterization, prediction_from_output
from ldm.models.diffusion.time_grid import TimeGrid
from ldm.modules.context import PromptContext

Conditioning = Tensor | PromptContext
Denoiser = Callable[[Tensor, int], Prediction]  # of x and a place on the grid
NoiseSource = Callable[[], Tensor]
Step = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # to x one place on, and the guess of the final image


class DiffusionModel(Protocol):
    """What a sampler needs of a model: its schedule, what its output means, and the output itself."""

    parameterization: str
    alphas_cumprod: Tensor

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        """The network's output on x (B, C, H, W) at the steps t (B,), whole or fractions."""


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
    model: DiffusionModel, grid: TimeGrid, conditioning: Conditioning | None, unconditional: Conditioning | None,
    scale: float,
) -> Denoiser:
    """The model on a grid: `scale` of the way from its unconditional to its conditional output.

    At scale 1 the unconditional output drops out and is not computed. The batch of both conditionings is built here,
    once, so that what it caches serves every step. The three parameterizations are affine in each other at a fixed x,
    so guiding the raw output guides each of them.
    """
    guided = scale != 1
    context = guidance_batch(unconditional, conditioning) if guided else conditioning
    if isinstance(context, PromptContext):
        context = replace(context, cache=True)  # a copy: weights may change before its owner uses it again

    def denoise(x: Tensor, i: int) -> Prediction:
        inputs = torch.cat([x, x]) if guided else x
        times = torch.full((len(inputs),), grid.times[i], device=x.device)  # integers for a whole time
        output = model.apply_model(inputs, times, context).to(x.dtype)  # the network may run in 16 bits
        if guided:
            output = torch.lerp(*output.chunk(2), scale)
        return prediction_from_output(model.parameterization, x, grid.alpha_bar[i], output)

    return denoise


def ddim_sigma(alpha_bar: float, alpha_bar_next: float, eta: float) -> float:
    """Standard deviation of the noise that a step from a(t) = `alpha_bar` to `alpha_bar_next` adds; DDIM eq. 16."""
    return eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))


def ddim_step(predict: Denoiser, grid: TimeGrid, eta: float, draw: NoiseSource) -> Step:
    """The step of DDIM (eq. 12) with what `predict` says; `draw` is where it takes the noise that `eta` asks for."""

    def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        prediction, after = predict(x, i), grid.alpha_bar_next[i]
        sigma = ddim_sigma(grid.alpha_bar[i], after, eta)
        if not sigma:
            return add_noise(prediction, after), prediction.x0
        old_noise = math.sqrt(max(1 - after - sigma**2, 0.0))
        return math.sqrt(after) * prediction.x0 + old_noise * prediction.eps + sigma * draw(), prediction.x0

    return step


def inpainting_step(step: Step, grid: TimeGrid, x0: Tensor, mask: Tensor, draw: NoiseSource) -> Step:
    """`step` with `x0` in place of x where the mask is 1: noised before each step, and as it is after the last."""

    def inpaint(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        after, guess = step(torch.lerp(x, add_noise(Prediction(draw(), x0), grid.alpha_bar[i]), mask), i)
        return (torch.lerp(after, x0, mask) if i + 1 == len(grid) else after), guess

    return inpaint


def run_steps(
    step: Step, x: Tensor, steps: int, *, log_every_t: int, verbose: bool,
    callback: Callable[[int], None] | None, img_callback: Callable[[Tensor, int], None] | None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Takes all steps of a grid; returns the last x and what was kept along the way (see `Sampler.sample`)."""
    alpha_bar = {"x_inter": [x], "pred_x0": [x]}
    for i in trange(steps, desc="sampling", disable=not verbose):
        x, pred_x0 = step(x, i)
        if callback is not None:
            callback(i)
        if img_callback is not None:
            img_callback(pred_x0, i)
        if i == 0 or (steps - 1 - i) % log_every_t == 0:
            alpha_bar["x_inter"].append(x)
            alpha_bar["pred_x0"].append(pred_x0)
    return x, alpha_bar


class Sampler(ABC):
    """A model together with a way of walking from noise to an image.

    Attributes:
        label: the method's name in messages.
        takes_noise: whether it works with an eta above 0.
        usual_eta: its eta where none is given.
    """

    label: ClassVar[str]
    supports_eta: ClassVar[bool] = True
    default_eta: ClassVar[float] = 0.0

    def __init__(self, model: DiffusionModel) -> None:
        check_parameterization(model.parameterization)
        self.model = model

    @abstractmethod
    def make_grid(self, steps: int) -> TimeGrid:
        """The times of that many steps; raises a UserError where the schedule has not so many."""

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """What to take for noise and image during each step of the grid, called in order; as a rule those at its start.

        Whatever it remembers of earlier steps belongs to one walk.
        """
        return denoise

    @classmethod
    def resolve_eta(cls, eta: float | None) -> float:
        """`eta`, or this sampler's own where it is None; raises a UserError where it cannot work with it."""
        if eta is None:
            return cls.default_eta
        if eta and not cls.supports_eta:
            raise UserError(f"{cls.label} adds no noise, so eta must be 0, not {eta:g}; take DDIM or ancestral Euler")
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta:g} must lie between 0 (no noise added) and 1 (as much as DDPM)")
        return eta

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
        eta: float | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        strength: float | None = None,
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
            S: how many steps, 1..num_timesteps, a whole walk from noise to image has.
            shape: (C, H, W) of one latent.
            conditioning: (batch_size, N, d), encoded prompts; None for a model without conditioning.
            callback: called after each step with its number i, 0..S-1.
            img_callback: called after each step with the guess of the final latents (batch_size, C, H, W) and i.
            eta: 0..1, the share of DDPM's noise that is added at each step; None: 1 for ancestral Euler, else 0.
            mask: broadcasts to (batch_size, C, H, W); where it is 1, the latents follow `x0` and end there.
            x0: (batch_size, C, H, W), the latents to keep by `mask` or to start from by `strength`.
            strength: above 0 and up to 1, the share of the S steps, the last ones, that are taken, one or more; they
                start from `x0` with the noise of their first time. At 1, as when None, the start is noise alone.
            temperature: scales the noise of `eta`.
            verbose: shows a progress bar.
            x_T: (batch_size, C, H, W), the noise to start from or to add to `x0`; drawn where None.
            log_every_t: keep every so many steps, counted from the last, in the intermediates.
            unconditional_guidance_scale: 1 means no guidance.
            unconditional_conditioning: of the same shape as `conditioning`; needed unless the scale is 1.
            generators: one per image, the sources of all noise of that image; the global one where None.

        Returns:
            The latents (batch_size, C, H, W), and {"x_inter", "pred_x0"}: the start, then after the first step, every
            `log_every_t` steps and the last one the latents, and the guesses of the final latents.

        Raises:
            UserError: an argument is out of its range or does not fit the others. Nothing has been computed then.
        """
        grid, eta = self.make_grid(S), self.resolve_eta(eta)
        if log_every_t < 1:
            raise UserError(f"log_every_t {log_every_t} must be 1 or more")
        size = _latent_size(batch_size, shape)
        _check_noise(size, eta, temperature, x_T)
        _check_guidance(batch_size, conditioning, unconditional_conditioning, unconditional_guidance_scale)
        _check_original(size, mask, x0, strength)
        device = self.model.alphas_cumprod.device
        draw = noise_source(size, device, generators)
        x = draw() if x_T is None else x_T.to(device)
        original = x if x0 is None else x0.to(x)
        if strength is not None and strength < 1:
            grid = grid.end(max(1, round(strength * S)))
            x = add_noise(Prediction(x, original), grid.alpha_bar[0])

        denoise = guided_denoiser(
            self.model, grid, conditioning, unconditional_conditioning, unconditional_guidance_scale
        )
        step = ddim_step(self.make_predictor(denoise, grid), grid, eta, lambda: temperature * draw())
        if mask is not None:
            step = inpainting_step(step, grid, original, mask.to(original), draw)
        return run_steps(
            step, x, len(grid), log_every_t=log_every_t, verbose=verbose, callback=callback, img_callback=img_callback
        )


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


def _check_original(size: tuple[int, ...], mask: Tensor | None, x0: Tensor | None, strength: float | None) -> None:
    """Of latents to keep or to start from."""
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"strength {strength} must be above 0 (x0 stays as it is) and at most 1 (it is not looked at)")
    if (x0 is None) != (mask is None and strength is None):
        raise UserError("x0 belongs together with a mask or a strength: give it with one of them or both, or none")
    if x0 is not None and tuple(x0.shape) != size:
        raise UserError(f"x0 has shape {tuple(x0.shape)}, but the latents have {size}")
    if mask is None:
        return
    if mask.ndim > 4 or any(have not in (1, want) for have, want in zip(mask.shape[::-1], size[::-1], strict=False)):
        raise UserError(f"mask of shape {tuple(mask.shape)} does not broadcast to the latents' {size}")
