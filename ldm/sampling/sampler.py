"""What the samplers share: a guided denoiser, a source of noise, the DDIM update, and the loop over the steps.

A sampler consists of a grid of noise levels and a predictor: the noise in x and the image behind it that hold for a
whole step. All samplers then apply the same update, `ddim_update`, which is exact if those two stay constant over the
step. Some add more noise in a step than DDIM does. Guidance is Ho & Salimans 2022, Eq. 6, with a scale of 1 + w, so
that 1 means no guidance.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor
from tqdm import trange

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext
from ldm.modules.diffusionmodules.util import ddim_sigma
from ldm.sampling.checks import check_guidance, check_noise, check_original, latent_size
from ldm.sampling.schedule import (
    AlphaBar,
    Prediction,
    add_noise,
    check_parameterization,
    check_terminal_snr,
    prediction_from_output,
)
from ldm.sampling.spacings import TIMESTEP_SPACINGS
from ldm.sampling.time_grid import SpacingRule, TimeGrid, evenly_spaced_grid, karras_grid

Conditioning = Tensor | PromptContext
Denoiser = Callable[[Tensor, int], Prediction]  # (x, index on the grid) -> prediction
NoiseSource = Callable[[], Tensor]
Step = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x, index on the grid) -> (next x, predicted x_0)


class DiffusionModel(Protocol):
    """What a sampler needs of a model: its schedule, its parameterization and its output."""

    parameterization: str
    alphas_cumprod: Tensor

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        """Return the network's output at x (B, C, H, W) and timesteps t (B,), integers or fractions."""


def noise_source(size: Sequence[int], device: torch.device, generators: Sequence[Generator] | None) -> NoiseSource:
    """Return a function that returns new standard normal noise of `size` (B, ...) at each call.

    With generators, image i takes its noise from the i-th generator alone, so it does not depend on its neighbors. The
    noise is generated on the generator's device: generators on the CPU give the same images on every device.

    Raises:
        UserError: if the number of generators is not the number of images.
    """
    if generators is None:
        return partial(torch.randn, tuple(size), device=device)
    if len(generators) != size[0]:
        raise UserError(f"{len(generators)} generators for {size[0]} images; give one for each image")

    def sample_noise() -> Tensor:
        return torch.stack([torch.randn(size[1:], generator=g, device=g.device).to(device) for g in generators])

    return sample_noise


# Guidance


def guidance_batch(unconditional: Conditioning, conditional: Conditioning) -> Conditioning:
    """Return both conditionings (B, ...) as one batch (2B, ...), the unconditional one first.

    If one of them is a `PromptContext`, a plain tensor counts as prompts without concepts.
    """
    both = [unconditional, conditional]
    if all(isinstance(one, Tensor) for one in both):
        return torch.cat(both)
    return PromptContext.cat([PromptContext.plain(one) if isinstance(one, Tensor) else one for one in both])


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Return a guided output (B, ...) moved towards one with the conditional output's standard deviation.

    Args:
        share: 0..1, how far; 0 changes nothing.

    Source: Lin, Liu, Li & Yang 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Eq. 15 and 16.
    """
    of_image = tuple(range(1, guided.ndim))
    rescaled = guided * (conditional.std(of_image, keepdim=True) / guided.std(of_image, keepdim=True))
    return torch.lerp(guided, rescaled, share)


def guided_denoiser(
    model: DiffusionModel, grid: TimeGrid, conditioning: Conditioning | None, unconditional: Conditioning | None,
    scale: float, rescale: float = 0.0,
) -> Denoiser:
    """Return the model's prediction with classifier-free guidance, as a function of x and an index on the grid.

    At scale 1 the unconditional output cancels and is not computed. The batch of both conditionings is built here,
    once, so that its cached keys and values serve all steps. The three parameterizations are affine in each other at a
    fixed x, so guiding the raw output guides each of them.

    Args:
        rescale: see `rescale_guidance`.
    """
    guided = scale != 1
    context = guidance_batch(unconditional, conditioning) if guided else conditioning
    if isinstance(context, PromptContext):
        context = replace(context, cache=True)  # a copy: weights may change before its owner uses it again

    def denoise(x: Tensor, i: int) -> Prediction:
        inputs = torch.cat([x, x]) if guided else x
        times = torch.full((len(inputs),), grid.times[i], device=x.device)  # integers if the time is one
        output = model.apply_model(inputs, times, context).to(x.dtype)  # the network may run in 16 bits
        if guided:
            # Ho & Salimans, Eq. 6: unconditional + scale * (conditional - unconditional)
            without, with_prompt = output.chunk(2)
            output = torch.lerp(without, with_prompt, scale)
            if rescale:
                output = rescale_guidance(output, with_prompt, rescale)
        return prediction_from_output(model.parameterization, x, grid.alpha_bar[i], output)

    return denoise


# Steps


def ddim_update(prediction: Prediction, alpha_bar_next: AlphaBar, sigma: AlphaBar, sample_noise: NoiseSource
                ) -> Tensor:
    """Return x at the next noise level (DDIM Eq. 12).

    Args:
        prediction: eps and x_0 for the step.
        sigma: standard deviation of the noise that the step adds, see `ddim_sigma`; a number or one element.
        sample_noise: source of the noise; not called if the step adds none.
    """
    if not sigma:
        return add_noise(prediction, alpha_bar_next)
    # The three terms of Eq. 12: the predicted x_0, the direction that points to x_t, and random noise.
    direction = max(1 - alpha_bar_next - sigma**2, 0.0) ** 0.5 * prediction.eps
    return alpha_bar_next**0.5 * prediction.x0 + direction + sigma * sample_noise()


def ddim_step(predict: Denoiser, grid: TimeGrid, eta: float, sample_noise: NoiseSource) -> Step:
    """Return the step of a grid that applies the DDIM update to what `predict` returns."""
    levels = zip(grid.alpha_bar, grid.alpha_bar_next, strict=True)
    return noisy_step(predict, grid, [float(ddim_sigma(*level, eta)) for level in levels], sample_noise)


def noisy_step(predict: Denoiser, grid: TimeGrid, sigmas: Sequence[float], sample_noise: NoiseSource) -> Step:
    """Return the same with the standard deviation of the noise that each step adds."""

    def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        prediction = predict(x, i)
        return ddim_update(prediction, grid.alpha_bar_next[i], sigmas[i], sample_noise), prediction.x0

    return step


def inpainting_step(step: Step, grid: TimeGrid, x0: Tensor, mask: Tensor, sample_noise: NoiseSource) -> Step:
    """Return `step` with x replaced by `x0` where the mask is 1.

    The replacement has the noise of the current level before each step, and none after the last one.
    """

    def inpaint(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        noisy_x0 = add_noise(Prediction(sample_noise(), x0), grid.alpha_bar[i])
        x_next, pred_x0 = step(torch.lerp(x, noisy_x0, mask), i)
        if i + 1 == len(grid):
            x_next = torch.lerp(x_next, x0, mask)
        return x_next, pred_x0

    return inpaint


def run_steps(
    step: Step, x: Tensor, steps: int, *, log_every_t: int, verbose: bool,
    callback: Callable[[int], None] | None, img_callback: Callable[[Tensor, int], None] | None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Run all steps of a grid. Return the last x, and the intermediates that `Sampler.sample` describes."""
    intermediates = {"x_inter": [x], "pred_x0": [x]}
    for i in trange(steps, desc="sampling", disable=not verbose):
        x, pred_x0 = step(x, i)
        if callback is not None:
            callback(i)
        if img_callback is not None:
            img_callback(pred_x0, i)
        if i == 0 or (steps - 1 - i) % log_every_t == 0:
            intermediates["x_inter"].append(x)
            intermediates["pred_x0"].append(pred_x0)
    return x, intermediates


class Sampler(ABC):
    """A way to turn noise into an image with a diffusion model.

    Attributes:
        label: the method's name in messages.
        supports_eta: whether eta may be above 0.
        default_eta: the eta if none is given.
        spacings: names in `TIMESTEP_SPACINGS` that may replace its own grid; none if its grid is part of the method.
        spacing_rule: what it makes of evenly spaced timesteps.
        max_steps: most steps that its own grid has; None: as many as the model has timesteps.
    """

    label: ClassVar[str]
    supports_eta: ClassVar[bool] = True
    default_eta: ClassVar[float] = 0.0
    spacings: ClassVar[tuple[str, ...]] = tuple(TIMESTEP_SPACINGS)
    spacing_rule: ClassVar[SpacingRule] = SpacingRule()
    max_steps: ClassVar[int | None] = None

    def __init__(self, model: DiffusionModel) -> None:
        check_parameterization(model.parameterization)
        check_terminal_snr(model.alphas_cumprod, model.parameterization)
        self.model = model

    @abstractmethod
    def make_grid(self, steps: int) -> TimeGrid:
        """Return the sampler's own noise levels of `steps` steps.

        Raises:
            UserError: if the schedule has fewer timesteps.
        """

    def spaced_grid(self, steps: int, spacing: str | None = None) -> TimeGrid:
        """Return the noise levels of `steps` steps with a given spacing.

        Args:
            spacing: a name in `TIMESTEP_SPACINGS`. None: the sampler's own; but on a schedule that ends in pure noise
                "trailing", which starts there (Lin et al. 2023, Sec. 3.3).

        Raises:
            UserError: if the schedule has fewer timesteps, or the sampler cannot use that spacing.
        """
        self.check_spacing(spacing)
        schedule = self.model.alphas_cumprod
        if spacing is None and schedule[-1] == 0 and "trailing" in self.spacings:
            spacing = "trailing"
        if spacing is None:
            return self.make_grid(steps)
        if spacing == "karras":
            return karras_grid(schedule, steps)
        return evenly_spaced_grid(schedule, steps, spacing, self.spacing_rule)

    def network_grid(self, grid: TimeGrid) -> TimeGrid:
        """Return the levels at which the network is evaluated; those of `grid` come first."""
        return grid

    def make_predictor(self, denoise: Denoiser, grid: TimeGrid) -> Denoiser:
        """Return what predicts eps and x_0 for each step of the grid, called in order; by default `denoise` itself.

        A predictor may remember earlier steps. Each run makes its own.
        """
        return denoise

    def make_step(self, denoise: Denoiser, grid: TimeGrid, eta: float, sample_noise: NoiseSource) -> Step:
        """Return the step of a run; by default the DDIM update of what the predictor returns."""
        return ddim_step(self.make_predictor(denoise, grid), grid, eta, sample_noise)

    @classmethod
    def check_spacing(cls, spacing: str | None) -> None:
        """Raise UserError if the sampler cannot use that spacing of timesteps."""
        if spacing is None or spacing in cls.spacings:
            return
        if not cls.spacings:
            raise UserError(f"{cls.label} has timesteps of its own; leave timestep_spacing out")
        known = "cannot use" if spacing in TIMESTEP_SPACINGS else "does not know"
        raise UserError(f"{cls.label} {known} timestep_spacing {spacing!r}; choose one of {', '.join(cls.spacings)}")

    @classmethod
    def check_steps(cls, steps: int) -> None:
        """Raise UserError if the sampler itself, with any model, cannot take that many steps."""
        if cls.max_steps is not None and steps > cls.max_steps:
            raise UserError(f"{steps} sampling steps: {cls.label} takes 1 to {cls.max_steps}; 4 to 8 are usual")

    @classmethod
    def resolve_eta(cls, eta: float | None) -> float:
        """Return `eta`, or this sampler's default if it is None. Raise UserError if the sampler cannot use it."""
        if eta is None:
            return cls.default_eta
        if eta and not cls.supports_eta:
            raise UserError(f"{cls.label} adds no noise, so eta must be 0, not {eta:g}; use DDIM or ancestral Euler")
        if not 0 <= eta <= 1:
            raise UserError(f"eta {eta:g} must be between 0 (no noise) and 1 (as much as DDPM)")
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
        timestep_spacing: str | None = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample `batch_size` latents.

        Args:
            S: number of steps from noise to image, 1..num_timesteps.
            shape: (C, H, W) of one latent.
            conditioning: (batch_size, N, d), encoded prompts; None for a model without conditioning.
            callback: called after each step with its index i, 0..S-1.
            img_callback: called after each step with the predicted x_0 (batch_size, C, H, W) and i.
            eta: 0..1, the share of DDPM's noise that each step adds; None: the sampler's default.
            mask: broadcasts to (batch_size, C, H, W); where it is 1, the latents follow `x0` and end there.
            x0: (batch_size, C, H, W), the latents to keep by `mask` or to start from by `strength`.
            strength: in (0, 1], the share of the S steps, the last ones, that are run (at least one). They start
                from `x0` with the noise of their first timestep. At 1, as for None, the start is pure noise.
            temperature: factor of the noise of `eta`.
            verbose: whether to show a progress bar.
            x_T: (batch_size, C, H, W), the noise to start from or to add to `x0`; None: random.
            log_every_t: interval of the steps, counted from the last, that the intermediates hold.
            unconditional_guidance_scale: 1 means no guidance.
            unconditional_conditioning: has the same shape as `conditioning`; required unless the scale is 1.
            generators: one per image, the sources of all noise of that image; None: the global one.
            timestep_spacing: see `spaced_grid`.
            guidance_rescale: 0..1, see `rescale_guidance`.

        Returns:
            The latents (batch_size, C, H, W), and {"x_inter", "pred_x0"}: latents and predicted x_0 at the start, after
            the first step, after every `log_every_t` steps, and after the last one.

        Raises:
            UserError: if an argument is out of range or contradicts another one. Nothing has been computed then.
        """
        self.check_steps(S)
        grid = self.spaced_grid(S, timestep_spacing)
        eta = self.resolve_eta(eta)
        if log_every_t < 1:
            raise UserError(f"log_every_t {log_every_t} must be 1 or more")
        size = latent_size(batch_size, shape)
        check_noise(size, eta, temperature, x_T)
        check_guidance(batch_size, conditioning, unconditional_conditioning, unconditional_guidance_scale,
                       guidance_rescale)
        check_original(size, mask, x0, strength)

        # Start: pure noise, or x0 with the noise of the first of the last `strength` steps.
        device = self.model.alphas_cumprod.device
        sample_noise = noise_source(size, device, generators)
        x = sample_noise() if x_T is None else x_T.to(device)
        original = x if x0 is None else x0.to(x)
        if strength is not None and strength < 1:
            grid = grid.end(max(1, round(strength * S)))
            x = add_noise(Prediction(x, original), grid.alpha_bar[0])

        # One step: the guided model, this sampler's predictor and update, and inpainting if there is a mask.
        denoise = guided_denoiser(
            self.model, self.network_grid(grid), conditioning, unconditional_conditioning,
            unconditional_guidance_scale, guidance_rescale)
        step = self.make_step(denoise, grid, eta, lambda: temperature * sample_noise())
        if mask is not None:
            step = inpainting_step(step, grid, original, mask.to(original), sample_noise)

        return run_steps(
            step, x, len(grid), log_every_t=log_every_t, verbose=verbose, callback=callback, img_callback=img_callback
        )
