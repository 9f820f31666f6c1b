"""Schedules that end in pure noise (Lin et al. 2023) and all samplers on them."""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from helpers.sampling_models import (
    SAMPLER_CLASSES,
    SHAPE,
    FamilyTinyModel,
    TinyModel,
    convolution_network,
    gaussian_denoiser,
    start_noise,
)
from helpers.tiny_models import unet_config

from ldm.common.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.sampling.schedule import diffusion_buffers, rescale_to_zero_terminal_snr
from ldm.sampling.time_grid import half_log_snr

EVERY = pytest.mark.parametrize("name", SAMPLER_CLASSES)
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def tiny_model(kind: str = "v") -> TinyModel:
    return TinyModel(convolution_network, kind, zero_terminal_snr=True)


@pytest.mark.parametrize("schedule", ["linear", "sqrt_linear", "cosine"])
def test_the_betas_are_those_of_diffusers(schedule):
    betas = torch.from_numpy(make_beta_schedule(schedule, 1000, 0.00085, 0.012))
    rescaled = rescale_to_zero_terminal_snr(betas)
    torch.testing.assert_close(rescaled, rescale_zero_terminal_snr(betas), rtol=0, atol=1e-15)
    assert rescaled[0] == pytest.approx(betas[0].item(), rel=1e-9) and rescaled[-1] == 1
    buffers = diffusion_buffers(schedule, 1000, 0.00085, 0.012, zero_terminal_snr=True)
    assert buffers["alphas_cumprod"][-1] == 0 and (buffers["alphas_cumprod"][:-1] > 0).all()
    infinite = {name for name, tensor in buffers.items() if not tensor.isfinite().all()}
    assert infinite == {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}


def test_models_take_it_as_a_parameter():
    settings = {"unet_config": unet_config(context_dim=8), "use_ema": False}
    model = DDPM(**settings, parameterization="v", zero_terminal_snr=True)
    assert model.alphas_cumprod[-1] == 0 and DDPM(**settings, parameterization="v").alphas_cumprod[-1] > 0
    with pytest.raises(UserError, match="zero_terminal_snr: the last timestep is pure noise.* parameterization: v"):
        DDPM(**settings, zero_terminal_snr=True)
    with pytest.raises(UserError, match="zero_terminal_snr"):
        SAMPLER_CLASSES["ddim"](tiny_model("eps"))


@EVERY
@pytest.mark.parametrize("kind", ["v", pytest.param("x0", marks=pytest.mark.slow)])
def test_samplers_start_at_pure_noise_and_stay_finite(name, kind):
    for steps in (1, 2, 6):
        for spacing in (None, *SAMPLER_CLASSES[name].spacings):
            model = tiny_model(kind)
            x, history = SAMPLER_CLASSES[name](model).sample(
                steps, 2, SHAPE, verbose=False, timestep_spacing=spacing, log_every_t=1)
            assert all(one.isfinite().all() for one in (x, *history["x_inter"], *history["pred_x0"]))
            assert model.calls[0][1][0] == 999 or spacing == "leading" or (
                spacing == "linspace" and name == "plms")


@EVERY
def test_a_denoiser_that_knows_its_image_reaches_it(name):
    known = start_noise(seed=5)
    got, _ = SAMPLER_CLASSES[name](gaussian_denoiser(known, 0.0, "v", zero_terminal_snr=True)).sample(
        10, 2, SHAPE, verbose=False)
    assert (got - known).abs().max() < 0.15


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("name", "scheduler"), [
    ("ddim", DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, clip_sample=False)),
    ("euler", EulerDiscreteScheduler(**SCHEDULE)), ("dpm", DPMSolverMultistepScheduler(**SCHEDULE)),
    ("unipc", UniPCMultistepScheduler(**SCHEDULE))])
def test_samplers_agree_with_diffusers(name, scheduler, steps):
    """Whose schedulers, other than DDIM, take 2^-24 for an alpha_bar of 0; multistep methods extrapolate from there."""
    scheduler.set_timesteps(steps)
    x = start_noise() * (scheduler.sigmas[0] if name == "euler" else 1)
    for t in scheduler.timesteps:
        output = convolution_network(scheduler.scale_model_input(x, t), t.expand(2))
        x = scheduler.step(output, t, x).prev_sample
    for last, tolerance in ((0.0, 0.05 if name in ("dpm", "unipc") else 1e-3), (2**-24, 1e-3)):
        model = tiny_model()
        model.alphas_cumprod[-1] = last
        got, _ = SAMPLER_CLASSES[name](model).sample(steps, 2, SHAPE, verbose=False, x_T=start_noise(),
                                                     timestep_spacing="trailing")
        torch.testing.assert_close(got, x, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("cls", [DDIMSampler, PLMSSampler, DPMSolverSampler])
@pytest.mark.parametrize("steps", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_the_familys_samplers_stay_finite(cls, steps):
    model = FamilyTinyModel(convolution_network, "v", 500, zero_terminal_snr=True)
    x, _ = cls(model).sample(steps - (cls is DPMSolverSampler), 2, SHAPE, verbose=False)
    assert x.isfinite().all()
    # Their own timesteps reach the last one only if all are visited; DPM-Solver's are fractions of 1000.
    assert model.calls[0][1][0].item() == pytest.approx(998 if cls is DPMSolverSampler else 499) or steps < 500


def test_lambda_is_infinite_at_both_ends():
    assert half_log_snr(0) == -math.inf and half_log_snr(1.0) == math.inf


def test_nothing_changes_for_other_schedules():
    same: dict[str, Any] = {"beta_schedule": "linear", "timesteps": 50}
    for name, tensor in diffusion_buffers(**same).items():
        assert torch.equal(tensor, diffusion_buffers(**same, zero_terminal_snr=False)[name])
