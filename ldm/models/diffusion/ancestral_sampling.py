"""Sampling by the reversed Markov chain itself, one step for each training timestep (Ho et al. 2020, DDPM, Alg. 2).

The methods have the names, parameters and random numbers of the LDM family: the noise of all images comes from the
global generator, in every step. The samplers of `ldm.sampling` need far fewer steps.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from ldm.common.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.diffusion_process import DiffusionProcess, Moments
from ldm.models.diffusion.wrapper import Condition
from ldm.modules.diffusionmodules.util import noise_like

Callback = Callable[[int], None] | None
ImageCallback = Callable[[Tensor, int], None] | None


class AncestralSampling(DiffusionProcess):
    """Mixin for models of images without a condition."""

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> Moments:
        """Return mean, variance and log-variance of p(x_{t-1} | x_t), after the network's prediction of x_0.

        Args:
            clip_denoised: whether x_0 is limited to [-1, 1].
        """
        x_start = self.predict_start(x, t, self.model(x, t))
        return self.q_posterior(x_start.clamp(-1, 1) if clip_denoised else x_start, x, t)

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        """Return x_{t-1} for x_t `x`. With `repeat_noise` all images get the same noise."""
        mean, _, log_variance = self.p_mean_variance(x=x, t=t, clip_denoised=clip_denoised)
        return add_step_noise(mean, log_variance, t, noise_like(x.shape, x.device, repeat_noise))

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False
                      ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return images of `shape` (B, C, H, W), sampled from noise, and on request their states on the way."""
        x = torch.randn(tuple(shape), device=self.betas.device)
        states = [x]
        for i in trange(self.num_timesteps - 1, -1, -1, desc="Sampling t"):
            x = self.p_sample(x, timesteps_of(x, i), clip_denoised=self.clip_denoised)
            if i % self.log_every_t == 0 or i == self.num_timesteps - 1:
                states.append(x)
        return (x, states) if return_intermediates else x

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return `batch_size` images, as `p_sample_loop` does."""
        return self.p_sample_loop((batch_size, *self.latent_shape), return_intermediates=return_intermediates)


class ConditionalAncestralSampling(DiffusionProcess):
    """Mixin for models of latents. Conditions are what `apply_model` takes.

    Arguments that several methods share:
        clip_denoised: whether predictions of x_0 are limited to [-1, 1].
        quantize_denoised: whether predictions of x_0 are replaced by the nearest vectors of the first stage's codebook.
        score_corrector: object whose `modify_score(model, output, x, t, c, **corrector_kwargs)` replaces the output of
            the network, which must predict eps.
        temperature, noise_dropout: factor of the noise of a step, and share of it that is set to 0.
        mask, x0: where the mask is 1, latents follow the noised x0.
        x_T: noise to start from; None: new noise.
        start_T, timesteps: run only the last so many steps.
        log_every_t: interval of the timesteps whose state is returned; None: the model's own.
        callback, img_callback: called after each step with its timestep, and with the latents and the timestep.
    """

    def p_mean_variance(self, x: Tensor, c: Condition, t: Tensor, clip_denoised: bool,
                        return_codebook_ids: bool = False, quantize_denoised: bool = False, return_x0: bool = False,
                        score_corrector: Any = None, corrector_kwargs: Mapping[str, Any] | None = None
                        ) -> tuple[Tensor, ...]:
        """Return mean, variance and log-variance of p(x_{t-1} | x_t).

        A fourth value follows on request: the network's logits of codebook ids, or else the predicted x_0.
        """
        output = self.apply_model(x, t, c, return_ids=return_codebook_ids)
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise UserError(f"score_corrector: needs a model that predicts eps, not {self.parameterization}")
            output = score_corrector.modify_score(self, output, x, t, c, **(corrector_kwargs or {}))
        logits = None
        if return_codebook_ids:
            output, logits = output
        x_start = self.predict_start(x, t, output)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        if quantize_denoised:
            x_start = self.first_stage_model.quantize(x_start)[0]
        moments = self.q_posterior(x_start=x_start, x_t=x, t=t)
        if return_codebook_ids:
            return *moments, logits
        return (*moments, x_start) if return_x0 else moments

    @torch.no_grad()
    def p_sample(self, x: Tensor, c: Condition, t: Tensor, clip_denoised: bool = False, repeat_noise: bool = False,
                 return_codebook_ids: bool = False, quantize_denoised: bool = False, return_x0: bool = False,
                 temperature: float = 1.0, noise_dropout: float = 0.0, score_corrector: Any = None,
                 corrector_kwargs: Mapping[str, Any] | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return x_{t-1} for x_t `x`, and the predicted x_0 if `return_x0`."""
        if return_codebook_ids:
            raise UserError("p_sample: return_codebook_ids is not supported; call p_mean_variance")
        mean, _, log_variance, *x_start = self.p_mean_variance(
            x=x, c=c, t=t, clip_denoised=clip_denoised, return_codebook_ids=return_codebook_ids,
            quantize_denoised=quantize_denoised, return_x0=return_x0, score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs)
        noise = noise_like(x.shape, x.device, repeat_noise) * temperature
        if noise_dropout > 0:
            noise = F.dropout(noise, p=noise_dropout)
        x = add_step_noise(mean, log_variance, t, noise)
        return (x, x_start[0]) if return_x0 else x

    @torch.no_grad()
    def progressive_denoising(
        self, cond: Condition, shape: Sequence[int], verbose: bool = True, callback: Callback = None,
        quantize_denoised: bool = False, img_callback: ImageCallback = None, mask: Tensor | None = None,
        x0: Tensor | None = None, temperature: float | Sequence[float] = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: Mapping[str, Any] | None = None, batch_size: int | None = None,
        x_T: Tensor | None = None, start_T: int | None = None, log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return latents and the x_0 predicted on the way to them.

        Args:
            shape: (B, C, h, w), or (C, h, w) with a `batch_size`.
            temperature: one for all steps, or one for each timestep.
        """
        size = tuple(shape) if batch_size is None else (batch_size, *shape)
        timesteps = self.num_timesteps if start_T is None else min(self.num_timesteps, start_T)
        temperatures = temperature if isinstance(temperature, Sequence) else [temperature] * timesteps

        def step(x: Tensor, cond: Condition, i: int) -> tuple[Tensor, Tensor]:
            return self.p_sample(
                x, cond, timesteps_of(x, i), clip_denoised=self.clip_denoised, quantize_denoised=quantize_denoised,
                return_x0=True, temperature=temperatures[i], noise_dropout=noise_dropout,
                score_corrector=score_corrector, corrector_kwargs=corrector_kwargs)

        start = torch.randn(size, device=self.betas.device) if x_T is None else x_T
        x, predictions = start, []
        for i, x, x_start in self._denoise(start, first_rows(cond, size[0]), timesteps, step, mask, x0, verbose,
                                           "Progressive Generation"):
            if i % (log_every_t or self.log_every_t) == 0 or i == timesteps - 1:
                predictions.append(x_start)
            _report(x, i, callback, img_callback)
        return x, predictions

    @torch.no_grad()
    def p_sample_loop(
        self, cond: Condition, shape: Sequence[int], return_intermediates: bool = False, x_T: Tensor | None = None,
        verbose: bool = True, callback: Callback = None, timesteps: int | None = None,
        quantize_denoised: bool = False, mask: Tensor | None = None, x0: Tensor | None = None,
        img_callback: ImageCallback = None, start_T: int | None = None, log_every_t: int | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return latents of `shape` (B, C, h, w), and on request their states on the way."""
        timesteps = self.num_timesteps if timesteps is None else timesteps
        timesteps = timesteps if start_T is None else min(timesteps, start_T)

        def step(x: Tensor, cond: Condition, i: int) -> tuple[Tensor, Tensor]:
            x = self.p_sample(x, cond, timesteps_of(x, i), clip_denoised=self.clip_denoised,
                              quantize_denoised=quantize_denoised)
            return x, x

        start = torch.randn(tuple(shape), device=self.betas.device) if x_T is None else x_T
        x, states = start, [start]
        for i, x, _ in self._denoise(start, cond, timesteps, step, mask, x0, verbose, "Sampling t"):
            if i % (log_every_t or self.log_every_t) == 0 or i == timesteps - 1:
                states.append(x)
            _report(x, i, callback, img_callback)
        return (x, states) if return_intermediates else x

    def _denoise(self, x: Tensor, cond: Condition, timesteps: int, step: Callable[..., tuple[Tensor, Tensor]],
                 mask: Tensor | None, x0: Tensor | None, verbose: bool, title: str
                 ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each timestep from the last one on, with the latents after it and the second value of `step`."""
        if mask is not None and (x0 is None or x0.shape[2:3] != mask.shape[2:3]):
            raise UserError("mask: needs the latents x0, of the mask's height and width")
        for i in trange(timesteps - 1, -1, -1, desc=title, disable=not verbose):
            if self.shorten_cond_schedule:
                cond = self.noisy_condition(cond, timesteps_of(x, i))
            x, also = step(x, cond, i)
            if mask is not None:
                x = self.q_sample(x0, timesteps_of(x, i)) * mask + (1.0 - mask) * x
            yield i, x, also

    @torch.no_grad()
    def sample(self, cond: Condition, batch_size: int = 16, return_intermediates: bool = False,
               x_T: Tensor | None = None, verbose: bool = True, timesteps: int | None = None,
               quantize_denoised: bool = False, mask: Tensor | None = None, x0: Tensor | None = None,
               shape: Sequence[int] | None = None, **_: Any) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return `batch_size` latents for the first rows of `cond`, as `p_sample_loop` does; others are ignored."""
        return self.p_sample_loop(
            first_rows(cond, batch_size), (batch_size, *self.latent_shape) if shape is None else shape,
            return_intermediates=return_intermediates, x_T=x_T, verbose=verbose, timesteps=timesteps,
            quantize_denoised=quantize_denoised, mask=mask, x0=x0)

    @torch.no_grad()
    def sample_log(self, cond: Condition, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs: Any
                   ) -> tuple[Tensor, Any]:
        """Return latents and their states on the way, by `ddim_steps` steps of DDIM, or without `ddim` by all T."""
        if not ddim:
            return self.sample(cond=cond, batch_size=batch_size, return_intermediates=True, **kwargs)
        return DDIMSampler(self).sample(ddim_steps, batch_size, self.latent_shape, cond, verbose=False, **kwargs)


def add_step_noise(mean: Tensor, log_variance: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return a sample of N(mean, exp(log_variance)), or the mean itself at timestep 0."""
    is_noisy = (t != 0).float().view(-1, *(1,) * (mean.ndim - 1))
    return mean + is_noisy * (0.5 * log_variance).exp() * noise


def timesteps_of(x: Tensor, i: int) -> Tensor:
    """Return timestep `i` for each of the images x, (B,)."""
    return torch.full((len(x),), i, device=x.device, dtype=torch.long)


def first_rows(condition: Any, count: int) -> Any:
    """Return the condition of the first `count` images: of a tensor its rows, of lists and mappings those of each."""
    if condition is None:
        return None
    if isinstance(condition, Mapping):
        return {name: first_rows(value, count) for name, value in condition.items()}
    if isinstance(condition, list | tuple):
        return [value[:count] for value in condition]
    return condition[:count]


def _report(x: Tensor, i: int, callback: Callback, img_callback: ImageCallback) -> None:
    if callback is not None:
        callback(i)
    if img_callback is not None:
        img_callback(x, i)
