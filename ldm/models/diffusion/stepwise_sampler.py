"""The base of the LDM family's DDIM and PLMS samplers: tables, the loop over the steps, and the parts of a step."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldm.common.errors import UserError
from ldm.models.diffusion.conditions import warn_of_batch_size
from ldm.models.diffusion.family_sampler import FamilyModel, FamilySampler, Guidance, ScoreCorrector
from ldm.models.diffusion.sampling_util import norm_thresholding
from ldm.models.diffusion.wrapper import Condition
from ldm.modules.diffusionmodules.util import (
    ddim_sigma,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)
from ldm.sampling.sampler import ddim_update, run_steps
from ldm.sampling.schedule import AlphaBar, Prediction, marginal_tensors, prediction_from_output

Samples = tuple[Tensor, dict[str, list[Tensor]]]
# (x, condition, t, t of the next step, index in the tables, **options) -> (next x, predicted x_0)
Step = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Update:
    """How a step goes from a prediction to the next x; the attributes are parameters of `StepwiseSampler.sample`."""

    repeat_noise: bool
    quantize_denoised: bool
    temperature: float
    noise_dropout: float
    dynamic_threshold: float | None


@dataclass(frozen=True)
class NoiseLevel:
    """alpha_bar before and after a step, and sigma of the noise that it adds, each (1, 1, 1, 1) in float32."""

    alpha_bar: Tensor
    alpha_bar_next: Tensor
    sigma: Tensor


class StepwiseSampler(FamilySampler, ABC):
    """A sampler on DDIM's timesteps whose single steps are public.

    Args:
        model: see `FamilyModel`.
        schedule: kept as an attribute; it has no effect.
        device: device of the tables; None: the model's.
        kwargs: ignored, as everywhere in the family.

    Attributes that `make_schedule` sets, (T,) in float32 unless noted, S the number of steps:
        betas, alphas_cumprod, alphas_cumprod_prev: the model's schedule.
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod,
            sqrt_recipm1_alphas_cumprod: functions of alphas_cumprod.
        ddim_timesteps: array (S,) of integers, ascending.
        ddim_alphas, ddim_alphas_prev: alpha_bar before and after each step, (S,); the latter a float64 array.
        ddim_sigmas: sigma of the noise that each step adds, (S,) in float64.
        ddim_sqrt_one_minus_alphas: sqrt(1 - ddim_alphas), (S,).
        ddim_sigmas_for_original_num_steps: sigmas of the steps between all T timesteps.
    """

    def __init__(self, model: FamilyModel, schedule: str = "linear", device: torch.device | str | None = None,
                 **kwargs: Any) -> None:
        super().__init__(model, device)
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule

    def make_schedule(self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0,
                      verbose: bool = True) -> None:
        """Compute the tables.

        Args:
            ddim_num_steps: S, 1..T. If it does not divide T, there are more steps.
            ddim_discretize: "uniform" or "quad", see `make_ddim_timesteps`.
            ddim_eta: share of DDPM's noise in each step.
            verbose: whether to log tables.

        Raises:
            UserError: if S is out of range, or the model's tables do not have T entries.
        """
        alpha_bar, alpha_bar_prev = (
            table.detach().float().cpu() for table in (self.model.alphas_cumprod, self.model.alphas_cumprod_prev)
        )
        if len(alpha_bar) != self.ddpm_num_timesteps:
            raise UserError(f"the model has {self.ddpm_num_timesteps} timesteps, but {len(alpha_bar)} alphas_cumprod")
        timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps, verbose=verbose)
        # Above T / 2 steps, the family's spacing ends outside of the schedule.
        self.ddim_timesteps = timesteps[timesteps < self.ddpm_num_timesteps]
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(
            alpha_bar, self.ddim_timesteps, ddim_eta, verbose=verbose
        )
        sigmas_of_all_steps = ddim_sigma(alpha_bar.double().numpy(), alpha_bar_prev.double().numpy(), ddim_eta)
        tables = {
            "betas": self.model.betas.detach().float().clone(),
            "alphas_cumprod": alpha_bar.clone(),
            "alphas_cumprod_prev": alpha_bar_prev.clone(),
            **marginal_tensors(alpha_bar),
            "ddim_sigmas": sigmas,
            "ddim_alphas": alphas,
            "ddim_alphas_prev": alphas_prev,
            "ddim_sqrt_one_minus_alphas": (1 - alphas).sqrt(),
            "ddim_sigmas_for_original_num_steps": torch.from_numpy(sigmas_of_all_steps).float(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Condition = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> Samples:
        """Sample `batch_size` latents.

        Args:
            S: number of steps, 1..T; if it does not divide T, more are run.
            shape: (C, H, W) of one latent.
            conditioning: for the batch; another batch size only causes a warning.
            callback: called after each step with its index i, from 0.
            normals_sequence: ignored, as in the family.
            img_callback: called after each step with the predicted x_0 (batch_size, C, H, W) and i.
            quantize_x0: replace predicted x_0 by the nearest codes of the model's first stage.
            eta: share of DDPM's noise in each step; 0 is deterministic.
            mask: broadcasts to (batch_size, C, H, W); where it is 1, each step starts from `x0` with noise.
            x0: (batch_size, C, H, W), the latents to keep by `mask`; ignored without one.
            temperature: factor of the noise of `eta`.
            noise_dropout: probability by which elements of this noise are set to 0.
            score_corrector: changes the predicted noise; `corrector_kwargs` are passed to it.
            verbose: whether to log tables.
            x_T: (batch_size, C, H, W), the noise to start from; None: random.
            log_every_t: interval of the steps, counted from the last, that the intermediates hold.
            unconditional_guidance_scale: 1 means no guidance.
            unconditional_conditioning: has the form of `conditioning`; without it there is no guidance.
            dynamic_threshold: largest root mean square of a predicted x_0 (PLMS only).
            ucg_schedule: a guidance scale for each step.
            kwargs: ignored.

        Returns:
            The latents (batch_size, C, H, W), and {"x_inter", "pred_x0"}: latents and predicted x_0 at the start, after
            the first step, after every `log_every_t` steps, and after the last one.
        """
        warn_of_batch_size(conditioning, batch_size)
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose)
        return self._loop(
            conditioning, (batch_size, *shape), callback=callback, img_callback=img_callback,
            quantize_denoised=quantize_x0, mask=mask, x0=x0, ddim_use_original_steps=False,
            noise_dropout=noise_dropout, temperature=temperature, score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs, x_T=x_T, log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            **_given(dynamic_threshold=dynamic_threshold, ucg_schedule=ucg_schedule),
        )

    @property
    @abstractmethod
    def _loop(self) -> Callable[..., Samples]:
        """The method that runs all steps; it has the parameters of `_run_timesteps`."""

    @abstractmethod
    def _make_step(self) -> Step:
        """Return the step of a new run, which may remember earlier steps."""

    @torch.no_grad()
    def _run_timesteps(
        self,
        cond: Condition,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> Samples:
        """Run all steps, after `make_schedule`.

        Args:
            shape: (B, C, H, W).
            ddim_use_original_steps: visit all of the model's timesteps.
            timesteps: run only the last of the steps; of DDIM's, one less than this number, as in the family.

        The other arguments and the result are those of `sample`.
        """
        x = self._start(shape, x_T)
        times = self._visited_timesteps(timesteps, ddim_use_original_steps)[::-1].tolist()
        if mask is not None and x0 is None:
            raise UserError("a mask needs x0, the latents to keep where it is 1")
        if ucg_schedule is not None and len(ucg_schedule) != len(times):
            raise UserError(f"ucg_schedule has {len(ucg_schedule)} scales for {len(times)} steps")
        options = dict(
            use_original_steps=ddim_use_original_steps, quantize_denoised=quantize_denoised, temperature=temperature,
            noise_dropout=noise_dropout, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs,
            unconditional_conditioning=unconditional_conditioning, **_given(dynamic_threshold=dynamic_threshold),
        )
        take_step = self._make_step()

        def step(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            t, t_next = (self._time_batch(times[min(k, len(times) - 1)], x) for k in (i, i + 1))
            if mask is not None:
                x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
            scale = unconditional_guidance_scale if ucg_schedule is None else ucg_schedule[i]
            return take_step(x, cond, t, t_next, len(times) - 1 - i, unconditional_guidance_scale=scale, **options)

        return run_steps(step, x, len(times), log_every_t=log_every_t, verbose=True, callback=callback,
                         img_callback=img_callback)

    def _visited_timesteps(self, timesteps: int | None, use_original_steps: bool) -> np.ndarray:
        """Return the timesteps of a run, ascending. See `_run_timesteps` for the arguments."""
        if use_original_steps:
            return np.arange(self.ddpm_num_timesteps if timesteps is None else timesteps)
        if timesteps is None:
            return self.ddim_timesteps
        count = len(self.ddim_timesteps)
        return self.ddim_timesteps[:int(min(timesteps / count, 1) * count) - 1]

    def _time_batch(self, time: int, x: Tensor) -> Tensor:
        """Return the timestep `time` for each sample of x, (B,)."""
        return torch.full((len(x),), time, device=x.device, dtype=torch.long)

    # One step

    def _noise_level(self, index: int, use_original_steps: bool, device: torch.device) -> NoiseLevel:
        """Return the noise levels of the step at `index` of DDIM's tables or of the model's.

        Tensors with dimensions turn outputs of 16 bits into float32; numbers would not.
        """
        if use_original_steps:
            tables = (self.model.alphas_cumprod, self.model.alphas_cumprod_prev,
                      self.ddim_sigmas_for_original_num_steps)
        else:
            tables = (self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas)
        return NoiseLevel(*(torch.full((1, 1, 1, 1), float(table[index]), device=device) for table in tables))

    def _predict(self, x: Tensor, c: Condition, t: Tensor, alpha_bar: AlphaBar, guidance: Guidance) -> Prediction:
        """Return eps and x_0 behind x (B, C, H, W) at timesteps t (B,), where the schedule has `alpha_bar`.

        A model that predicts v converts it itself if it has the family's methods for this.
        """
        output = self._guided_output(x, c, t, guidance)
        if guidance.score_corrector is not None:
            if self._parameterization != "eps":
                raise UserError(f"a score_corrector needs a model that predicts eps, not {self._parameterization}")
            output = guidance.score_corrector.modify_score(self.model, output, x, t, c,
                                                           **(guidance.corrector_kwargs or {}))
        if self._parameterization == "v" and hasattr(self.model, "predict_eps_from_z_and_v"):
            return Prediction(self.model.predict_eps_from_z_and_v(x, t, output),
                              self.model.predict_start_from_z_and_v(x, t, output))
        return prediction_from_output(self._parameterization, x, alpha_bar, output)

    def _update(self, prediction: Prediction, level: NoiseLevel, how: Update) -> tuple[Tensor, Tensor]:
        """Return the next x and the x_0 that it was computed from, both (B, C, H, W).

        Random numbers are drawn even if the step adds no noise, as in the family, so that images after this one stay
        the same.
        """
        x0 = prediction.x0
        if how.quantize_denoised:
            x0 = self.model.first_stage_model.quantize(x0)[0]
        if how.dynamic_threshold is not None:
            x0 = norm_thresholding(x0, how.dynamic_threshold)
        noise = how.temperature * noise_like(x0.shape, x0.device, how.repeat_noise)
        if how.noise_dropout > 0:
            noise = functional.dropout(noise, p=how.noise_dropout)
        return ddim_update(Prediction(prediction.eps, x0), level.alpha_bar_next, level.sigma, lambda: noise), x0


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None. Subclasses that were written for CompVis' code do not know them."""
    return {name: value for name, value in options.items() if value is not None}
