"""The LDM family's DPM-Solver++(2M) sampler. The pipeline's own is `ldm.sampling.dpm_solver.DPMSolver`.

It has evenly spaced times where the pipeline's has the noise levels of Karras et al. Interface and defaults are as in
stable-diffusion (CompVis) and stablediffusion (Stability AI).
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditions import warn_of_batch_size
from ldm.models.diffusion.family_sampler import FamilyModel, FamilySampler, Guidance, ScoreCorrector
from ldm.models.diffusion.wrapper import Condition
from ldm.sampling.dpm_solver import multistep_predictor
from ldm.sampling.sampler import ddim_step, run_steps
from ldm.sampling.schedule import Prediction, prediction_from_output
from ldm.sampling.time_grid import TimeGrid, time_uniform_grid

log = logging.getLogger(__name__)
FEW_STEPS = 15  # below, the last step is of first order


class DPMSolverSampler(FamilySampler):
    """DPM-Solver++ of second order, deterministic.

    Args:
        model: see `FamilyModel`.
        device: device of the attribute `alphas_cumprod`; None: the model's.
        kwargs: ignored, as everywhere in the family.

    Attributes:
        alphas_cumprod: (T,) in float32.
    """

    def __init__(self, model: FamilyModel, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(model, device)
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().float().clone())

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
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Sample `batch_size` latents.

        Args:
            S: number of steps, 1..T.
            shape: (C, H, W) of one latent.
            conditioning: for the batch; another batch size only causes a warning.
            callback: called after each step with its index i, from 0.
            img_callback: called after each step with the extrapolated x_0 (batch_size, C, H, W) and i.
            x_T: (batch_size, C, H, W), the noise to start from; None: random.
            unconditional_guidance_scale: 1 means no guidance.
            unconditional_conditioning: has the form of `conditioning`; without it there is no guidance.
            kwargs: ignored. So are the other parameters, which DDIMSampler uses; a mask causes a warning.

        Returns:
            The latents (batch_size, C, H, W), and None in place of intermediates.
        """
        warn_of_batch_size(conditioning, batch_size)
        if mask is not None:
            log.warning("DPMSolverSampler ignores the mask; use DDIMSampler or PLMSSampler")
        x = self._start((batch_size, *shape), x_T)
        grid = time_uniform_grid(self.alphas_cumprod, S)
        guidance = Guidance(unconditional_guidance_scale, unconditional_conditioning)
        predict = multistep_predictor(
            self._make_denoiser(conditioning, grid, guidance), grid, lower_order_final=S < FEW_STEPS
        )
        step = ddim_step(predict, grid, 0.0, _no_noise)
        x, _ = run_steps(step, x, S, log_every_t=S, verbose=True, callback=callback, img_callback=img_callback)
        return x, None

    def _make_denoiser(self, c: Condition, grid: TimeGrid, guidance: Guidance) -> Callable[[Tensor, int], Prediction]:
        def denoise(x: Tensor, i: int) -> Prediction:
            times = torch.full((len(x),), grid.times[i], device=x.device)
            output = self._guided_output(x, c, times, guidance).to(x.dtype)  # the network may run in 16 bits
            return prediction_from_output(self._parameterization, x, grid.alpha_bar[i], output)

        return denoise


def _no_noise() -> Tensor:
    raise AssertionError("steps at eta 0 add no noise")
