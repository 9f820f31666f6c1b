"""The LDM family's PLMS sampler. The pipeline's own is `ldm.sampling.plms.PLMS`.

Source: Liu, Ren, Lin & Zhao 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds"; interface and defaults
as in latent-diffusion, stable-diffusion (CompVis) and stablediffusion (Stability AI).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.family_sampler import Guidance, ScoreCorrector
from ldm.models.diffusion.stepwise_sampler import Samples, Step, StepwiseSampler, Update
from ldm.models.diffusion.wrapper import Condition
from ldm.sampling.plms import multistep_eps
from ldm.sampling.schedule import prediction_from_eps

REMEMBERED = 3  # earlier predictions that a step uses


class PLMSSampler(StepwiseSampler):
    """Linear multistep, deterministic. See `StepwiseSampler` for arguments, tables and `sample`.

    For a model that predicts v or x_0, predictions are converted to noise before they are combined. The family's code
    mistakes them for noise.
    """

    plms_sampling = StepwiseSampler._run_timesteps

    @property
    def _loop(self) -> Callable[..., Samples]:
        return self.plms_sampling

    def make_schedule(self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0,
                      verbose: bool = True) -> None:
        """Compute the tables, as `StepwiseSampler.make_schedule` does. Raise ValueError if eta is not 0."""
        if ddim_eta != 0:
            raise ValueError(f"ddim_eta must be 0 for PLMS, not {ddim_eta:g}; use DDIMSampler")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def _make_step(self) -> Step:
        old_eps: list[Tensor] = []

        def step(x: Tensor, c: Condition, t: Tensor, t_next: Tensor, index: int, **options: Any
                 ) -> tuple[Tensor, Tensor]:
            x, pred_x0, e_t = self.p_sample_plms(x, c, t, index=index, old_eps=old_eps, t_next=t_next, **options)
            old_eps.append(e_t)
            del old_eps[:-REMEMBERED]
            return x, pred_x0

        return step

    @torch.no_grad()
    def p_sample_plms(
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
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step.

        Args:
            x: (B, C, H, W).
            c: its condition.
            t: (B,), the timestep that the network is told.
            index: the step's index in DDIM's tables, or in the model's if `use_original_steps` is set.
            repeat_noise: use the same noise for all samples.
            old_eps: noise (B, C, H, W) predicted at earlier steps, the newest last; none at the first step.
            t_next: (B,), the timestep of the next step; the first step needs it.

        The other arguments are those of `sample`.

        Returns:
            The next x, the predicted x_0, and the noise predicted at x, each (B, C, H, W).
        """
        level = self._noise_level(index, use_original_steps, x.device)
        guidance = Guidance(unconditional_guidance_scale, unconditional_conditioning, score_corrector,
                            corrector_kwargs)
        how = Update(repeat_noise, quantize_denoised, temperature, noise_dropout, dynamic_threshold)
        prediction = self._predict(x, c, t, level.alpha_bar, guidance)
        e_t = prediction.eps
        if level.alpha_bar == 0:  # pure noise, where eps says nothing about the image: DDIM's step
            return (*self._update(prediction, level, how), e_t)
        if old_eps:
            eps = multistep_eps([e_t, *reversed(old_eps[-REMEMBERED:])])
        else:
            # Pseudo improved Euler: the mean of the noise at both ends of the step
            x_next, _ = self._update(prediction_from_eps(x, e_t, level.alpha_bar), level, how)
            eps = (e_t + self._predict(x_next, c, t_next, level.alpha_bar_next, guidance).eps) / 2
        x_prev, pred_x0 = self._update(prediction_from_eps(x, eps, level.alpha_bar), level, how)
        return x_prev, pred_x0, e_t
