"""The LDM family's PLMS and DPM-Solver samplers, against the pipeline's PLMS and diffusers' DPM-Solver."""
from __future__ import annotations

import logging

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from helpers.sampling_models import SHAPE, FamilyTinyModel, convolution_network, seeded_generator, start_noise
from torch import Tensor

from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_util import norm_thresholding
from ldm.sampling.plms import PLMS
from ldm.sampling.time_grid import time_uniform_grid

SIZE = (2, *SHAPE)
TEXT, EMPTY_TEXT = (torch.randn(2, 5, 4, generator=seeded_generator(seed)) for seed in (21, 22))
GUIDANCE = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": EMPTY_TEXT}


def model_of(kind: str = "eps", timesteps: int = 1000) -> FamilyTinyModel:
    return FamilyTinyModel(convolution_network, kind, timesteps)


# PLMS


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_plms_samples_are_those_of_the_pipelines_plms(kind):
    """For 20 steps the grids agree. Velocities become noise before they are combined."""
    settings = {"x_T": start_noise(), "verbose": False, **GUIDANCE}
    got, intermediates = PLMSSampler(model_of(kind)).sample(20, 2, SHAPE, TEXT, **settings)
    expected, expected_intermediates = PLMS(model_of(kind)).sample(20, 2, SHAPE, TEXT, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert len(intermediates["x_inter"]) == len(expected_intermediates["x_inter"])


def test_plms_refuses_eta():
    with pytest.raises(ValueError, match="ddim_eta must be 0"):
        PLMSSampler(model_of()).make_schedule(10, ddim_eta=0.5)
    with pytest.raises(ValueError, match="ddim_eta must be 0"):
        PLMSSampler(model_of()).sample(10, 2, SHAPE, TEXT, eta=1.0)


@pytest.mark.parametrize("steps", [1, 10, 30])
def test_plms_draws_at_every_step_and_twice_at_the_first(steps):
    model = model_of()
    torch.manual_seed(3)
    PLMSSampler(model).sample(steps, 2, SHAPE, TEXT, verbose=False)
    following = torch.rand(1)
    visited = len(range(0, 1000, 1000 // steps))
    torch.manual_seed(3)
    for _ in range(1 + visited + 1):  # the start, the steps, and once more
        torch.randn(SIZE)
    assert following == torch.rand(1)
    assert len(model.calls) == visited + 1


def test_plms_with_a_mask_draws_for_it_before_each_step():
    torch.manual_seed(3)
    mask = torch.ones(1, 1, 6, 6)
    PLMSSampler(model_of()).sample(10, 2, SHAPE, TEXT, mask=mask, x0=start_noise(), verbose=False)
    following = torch.rand(1)
    torch.manual_seed(3)
    for _ in range(1 + 2 * 10 + 1):
        torch.randn(SIZE)
    assert following == torch.rand(1)


@pytest.mark.parametrize(("earlier", "weights"), [
    (1, (3 / 2, -1 / 2)), (2, (23 / 12, -16 / 12, 5 / 12)), (3, (55 / 24, -59 / 24, 37 / 24, -9 / 24)),
    (5, (55 / 24, -59 / 24, 37 / 24, -9 / 24)),
])
def test_plms_combines_earlier_noise(earlier, weights):
    sampler, x = PLMSSampler(model_of()), start_noise()
    sampler.make_schedule(20, verbose=False)
    old_eps = [start_noise(seed=10 + i) for i in range(earlier)]
    t = torch.full((2,), 151)
    x_next, x0, eps = sampler.p_sample_plms(x, TEXT, t, 3, old_eps=old_eps, t_next=t - 50)
    torch.testing.assert_close(eps, convolution_network(x, t, TEXT))
    newest_first = [eps, *old_eps[::-1]]
    combined = sum(weight * one for weight, one in zip(weights, newest_first, strict=False))
    level, level_next = sampler.ddim_alphas[3].item(), sampler.ddim_alphas_prev[3]
    torch.testing.assert_close(x0, (x - (1 - level) ** 0.5 * combined) / level**0.5)
    torch.testing.assert_close(x_next, level_next**0.5 * x0 + (1 - level_next) ** 0.5 * combined)


def test_plms_threshold():
    x = torch.stack([torch.full(SHAPE, 4.0), torch.full(SHAPE, 0.5)])
    torch.testing.assert_close(norm_thresholding(x, 2.0), torch.stack([torch.full(SHAPE, 2.0), x[1]]))
    images = []
    PLMSSampler(model_of()).sample(10, 2, SHAPE, TEXT, dynamic_threshold=0.1, verbose=False,
                                   img_callback=lambda x0, i: images.append(x0))
    assert all((x0.square().mean(dim=(1, 2, 3)).sqrt() < 0.1 + 1e-6).all() for x0 in images)


def test_plms_sampling_on_fewer_timesteps():
    sampler = PLMSSampler(model_of())
    sampler.make_schedule(20, verbose=False)
    sampler.plms_sampling(TEXT, SIZE, timesteps=8)
    assert [int(t[0]) for _, t, _ in sampler.model.calls] == [301, 251, *range(251, 0, -50)]


# DPM-Solver


def diffusers_dpm(kind: str, steps: int, x: Tensor) -> Tensor:
    """Run diffusers' solver from t = 999 to t = 0. Only if `steps` divides 999, its timesteps are not rounded."""
    scheduler = DPMSolverMultistepScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type={"eps": "epsilon", "v": "v_prediction"}[kind],
        timestep_spacing="linspace", final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        outputs = [convolution_network(x, t.expand(2), text) for text in (EMPTY_TEXT, TEXT)]
        x = scheduler.step(outputs[0] + 3 * (outputs[1] - outputs[0]), t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("steps", [3, 9, 27, 111])
def test_dpm_samples_are_those_of_diffusers(kind, steps):
    """Below 15 steps the last one is of first order."""
    x_T = start_noise()
    got, intermediates = DPMSolverSampler(model_of(kind)).sample(steps, 2, SHAPE, TEXT, x_T=x_T, **GUIDANCE)
    torch.testing.assert_close(got, diffusers_dpm(kind, steps, x_T), rtol=1e-3, atol=1e-3)
    assert intermediates is None


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_dpm_visits_evenly_spaced_times(timesteps):
    model = model_of(timesteps=timesteps)
    DPMSolverSampler(model).sample(10, 2, SHAPE, TEXT, **GUIDANCE)
    expected = time_uniform_grid(model.alphas_cumprod, 10).times
    assert [(t.dtype, t.tolist()) for _, t, _ in model.calls] == [(torch.float32, [time] * 4) for time in expected]


def test_dpm_draws_only_the_start():
    torch.manual_seed(3)
    got, _ = DPMSolverSampler(model_of()).sample(10, 2, SHAPE, TEXT)
    following = torch.rand(1)
    torch.manual_seed(3)
    expected, _ = DPMSolverSampler(model_of()).sample(10, 2, SHAPE, TEXT, x_T=torch.randn(SIZE))
    assert torch.equal(got, expected) and following == torch.rand(1)


def test_dpm_accepts_what_it_ignores(caplog):
    sampler, x_T, indices = DPMSolverSampler(model_of(), "cpu", anything=1), start_noise(), []
    expected, _ = sampler.sample(10, 2, SHAPE, TEXT, x_T=x_T)
    got, _ = sampler.sample(10, 2, SHAPE, TEXT, indices.append, eta=1.0, x0=x_T, x_T=x_T, unknown=2, log_every_t=3,
                            unconditional_guidance_scale=7.0)
    assert torch.equal(got, expected) and indices == list(range(10)) and not caplog.records
    with caplog.at_level(logging.WARNING):
        sampler.sample(2, 2, SHAPE, TEXT[:1], mask=torch.ones(1, 1, 6, 6), x0=x_T)
    assert "ignores the mask" in caplog.text and "conditioning for 1 images" in caplog.text


def test_dpm_reads_nested_conditions():
    def network(x: Tensor, t: Tensor, cond: dict[str, list[Tensor]]) -> Tensor:
        return convolution_network(x, t, sum(cond["c_crossattn"]))

    x_T = start_noise()
    expected, _ = DPMSolverSampler(model_of()).sample(10, 2, SHAPE, TEXT, x_T=x_T, **GUIDANCE)
    got, _ = DPMSolverSampler(FamilyTinyModel(network)).sample(
        10, 2, SHAPE, {"c_crossattn": [TEXT / 2, TEXT / 2]}, x_T=x_T, unconditional_guidance_scale=3.0,
        unconditional_conditioning={"c_crossattn": [EMPTY_TEXT / 2, EMPTY_TEXT / 2]},
    )
    torch.testing.assert_close(got, expected)


def test_dpm_attributes():
    model = model_of()
    sampler = DPMSolverSampler(model)
    assert sampler.model is model and torch.equal(sampler.alphas_cumprod, model.alphas_cumprod)
    assert sampler.alphas_cumprod.dtype == torch.float32 and sampler.device == torch.device("cpu")
