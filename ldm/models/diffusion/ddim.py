"""The LDM family's DDIM sampler. The pipeline's own is `ldm.sampling.ddim.DDIM`.

Source: Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models"; interface and defaults as in latent-diffusion,
stable-diffusion (CompVis) and stablediffusion (Stability AI).
"""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.family_sampler import Guidance, ScoreCorrector
from ldm.models.diffusion.stepwise_sampler import Samples, Step, StepwiseSampler, Update
from ldm.models.diffusion.wrapper import Condition
from ldm.sampling.sampler import run_steps
from ldm.sampling.schedule import add_noise, prediction_from_eps, q_sample


class DDIMSampler(StepwiseSampler):
    """Deterministic at eta 0, DDPM's posterior at eta 1. See `StepwiseSampler` for arguments, tables and `sample`."""

    ddim_sampling = StepwiseSampler._run_timesteps

    @property
    def _loop(self) -> Callable[..., Samples]:
        return self.ddim_sampling

    def _make_step(self) -> Step:
        def step(x: Tensor, c: Condition, t: Tensor, t_next: Tensor, index: int, **options: Any
                 ) -> tuple[Tensor, Tensor]:
            return self.p_sample_ddim(x, c, t, index=index, **options)

        return step

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            x: (B, C, H, W).
            c: its condition.
            t: (B,), the timestep that the network is told.
            index: the step's index in DDIM's tables, or in the model's if `use_original_steps` is set.
            repeat_noise: use the same noise for all samples.

        The other arguments are those of `sample`.

        Returns:
            The next x and the predicted x_0, both (B, C, H, W).
        """
        if dynamic_threshold is not None:
            raise NotImplementedError("DDIMSampler has no dynamic_threshold; PLMSSampler has")
        level = self._noise_level(index, use_original_steps, x.device)
        guidance = Guidance(unconditional_guidance_scale, unconditional_conditioning, score_corrector,
                            corrector_kwargs)
        prediction = self._predict(x, c, t, level.alpha_bar, guidance)
        how = Update(repeat_noise, quantize_denoised, temperature, noise_dropout, dynamic_threshold)
        return self._update(prediction, level, how)

    # Image to image

    @torch.no_grad()
    def stochastic_encode(self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
                          ) -> Tensor:
        """Return latents x0 (B, C, H, W) with the noise of the steps at indices t (B,). `decode` removes it.

        Args:
            use_original_steps: t are timesteps of the model instead of indices of DDIM's steps.
            noise: (B, C, H, W); None: random.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        if use_original_steps:
            return q_sample(self, x0, t, noise)
        tables = SimpleNamespace(sqrt_alphas_cumprod=self.ddim_alphas.sqrt(),
                                 sqrt_one_minus_alphas_cumprod=self.ddim_sqrt_one_minus_alphas)
        return q_sample(tables, x0, t, noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Condition,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return latents (B, C, H, W) after the last `t_start` steps from `x_latent`, after `make_schedule`.

        Args:
            use_original_steps: take the model's timesteps instead of DDIM's.
            callback: called after each step with its index i, from 0.
        """
        times = self._visited_timesteps(None, use_original_steps)[:t_start][::-1].tolist()

        def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return self.p_sample_ddim(
                x, cond, self._time_batch(times[i], x), index=len(times) - 1 - i, use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )

        return run_steps(step, x_latent, len(times), log_every_t=max(1, len(times)), verbose=True, callback=callback,
                         img_callback=None)[0]

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Condition,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Invert DDIM: return the latents from which deterministic steps lead to x0 (B, C, H, W).

        The network is told the index of a step as its timestep, as in Stability AI's code. That is the step's timestep
        only if `use_original_steps` is set; set it for an inversion that `decode` undoes well.

        Args:
            t_enc: number of steps, at most those of the schedule.
            use_original_steps: take the model's timesteps instead of DDIM's.
            return_intermediates: about how many latents on the way to return; None: none.
            callback: called after each step with its index i, from 0.

        Returns:
            The latents (B, C, H, W), and {"x_encoded", "intermediate_steps", "intermediates"}: the same latents, and
            those on the way with the indices of their steps.
        """
        alphas, alphas_next = self._inversion_levels(t_enc, use_original_steps)
        interval = max(1, t_enc // return_intermediates) if return_intermediates else None
        guidance = Guidance(unconditional_guidance_scale, unconditional_conditioning)
        x, intermediates, kept_steps = x0, [], []
        for i in range(t_enc):
            eps = self._predict(x, c, self._time_batch(i, x), alphas[i], guidance).eps
            # DDIM's update at eta 0, towards more noise
            x = add_noise(prediction_from_eps(x, eps, alphas[i]), alphas_next[i])
            if interval and (i % interval == 0 or i >= t_enc - 2):
                intermediates.append(x)
                kept_steps.append(i)
            if callback is not None:
                callback(i)
        result = {"x_encoded": x, "intermediate_steps": kept_steps}
        return x, {**result, "intermediates": intermediates} if return_intermediates else result

    def _inversion_levels(self, t_enc: int, use_original_steps: bool) -> tuple[list[float], list[float]]:
        """Return alpha_bar before and after the first `t_enc` steps of inversion."""
        tables = ((self.alphas_cumprod_prev, self.alphas_cumprod) if use_original_steps
                  else (self.ddim_alphas_prev, self.ddim_alphas))
        if not 0 <= t_enc <= len(tables[0]):
            raise ValueError(f"t_enc {t_enc} must be from 0 to {len(tables[0])}, the number of steps")
        before, after = (np.asarray(torch.as_tensor(table).cpu(), dtype=float)[:t_enc].tolist() for table in tables)
        return before, after
