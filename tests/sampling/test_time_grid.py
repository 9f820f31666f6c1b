"""The noise levels of sampling, against diffusers and the formulas of the papers."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from helpers.sampling_models import SAMPLER_CLASSES, TinyModel, convolution_network
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.common.errors import UserError
from ldm.sampling import time_grid as grids
from ldm.sampling.schedule import diffusion_buffers

SCHEDULE = diffusion_buffers("linear", 1000, 0.00085, 0.012)["alphas_cumprod"]
SPACINGS = (grids.leading_grid, grids.trailing_grid, grids.karras_grid)
EVERY = pytest.mark.parametrize("spacing", SPACINGS, ids=lambda spacing: spacing.__name__)


@EVERY
@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 60), timesteps=st.integers(60, 1000))
def test_every_number_of_steps_gives_a_valid_grid(spacing, steps, timesteps):
    schedule = diffusion_buffers("linear", timesteps, 0.00085, 0.012)["alphas_cumprod"]
    check(spacing(schedule, steps), steps, timesteps)


@EVERY
@pytest.mark.parametrize("steps", [1, 7, 333, 600, 999, 1000])
def test_up_to_all_timesteps_give_a_valid_grid(spacing, steps):
    check(spacing(SCHEDULE, steps), steps, 1000)


def check(grid: grids.TimeGrid, steps: int, timesteps: int) -> None:
    assert len(grid) == len(set(grid.times)) == steps
    assert grid.times[-1] >= 0 and grid.times[0] <= timesteps - 1
    assert list(grid.times) == sorted(grid.times, reverse=True)
    assert grid.alpha_bar[1:] == grid.alpha_bar_next[:-1]
    steps_of_grid = zip(grid.alpha_bar, grid.alpha_bar_next, strict=True)
    assert all(0 < start < end <= 1 for start, end in steps_of_grid)


@pytest.mark.parametrize("timesteps", [20, 1000])
def test_time_uniform_grid_interpolates_log_alpha_bar(timesteps):
    schedule = diffusion_buffers("linear", timesteps, 0.00085, 0.012)["alphas_cumprod"]
    grid = grids.time_uniform_grid(schedule, 7)
    assert len(grid) == 7 and grid.alpha_bar[1:] == grid.alpha_bar_next[:-1]
    assert grid.alpha_bar_next[-1] == pytest.approx(schedule[0].item())
    for i, (time, level) in enumerate(zip(grid.times, grid.alpha_bar, strict=True)):
        position = (timesteps - 1) * (7 - i) / 7  # in timesteps from the clean end
        below = int(position)
        low, high = schedule[below].item(), schedule[min(below + 1, timesteps - 1)].item()
        assert time == pytest.approx(position * 1000 / timesteps, abs=2e-4)
        assert level == pytest.approx(low ** (1 - position % 1) * high ** (position % 1), rel=1e-5)


def test_first_and_last_step_of_the_grids():
    known = SCHEDULE.double()
    leading, trailing, karras = (spacing(SCHEDULE, 20) for spacing in SPACINGS)
    assert leading.times == tuple(range(951, 0, -50)) and leading.alpha_bar_next[-1] == known[0]
    assert trailing.times == tuple(range(999, 0, -50)) and trailing.alpha_bar_next[-1] == 1
    assert karras.times[0] == pytest.approx(999) and karras.times[-1] == pytest.approx(0)
    assert karras.alpha_bar_next[-1] == 1
    for grid in (leading, trailing):
        assert grid.alpha_bar == tuple(known[list(grid.times)].tolist())


@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_karras_sigmas_and_their_times_match_diffusers(steps):
    scheduler = EulerDiscreteScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       use_karras_sigmas=True, sigma_min=0.029167, sigma_max=14.6147)
    scheduler.set_timesteps(steps)
    grid = grids.karras_grid(SCHEDULE, steps)
    alpha_bar = np.array(grid.alpha_bar)
    np.testing.assert_allclose(np.sqrt((1 - alpha_bar) / alpha_bar), scheduler.sigmas[:-1], rtol=1e-4)
    np.testing.assert_allclose(grid.times, scheduler.timesteps, rtol=1e-4, atol=1e-2)


def test_sigma_is_limited_on_schedules_that_end_in_pure_noise():
    cosine = diffusion_buffers("cosine", 1000)["alphas_cumprod"]
    grid = grids.karras_grid(cosine, 10)
    check(grid, 10, 1000)
    sigmas = np.sqrt(1 / np.array(grid.alpha_bar) - 1)
    assert sigmas[0] == pytest.approx(80) and (sigmas < 10).sum() >= 6
    known = cosine.double()
    assert known[int(grid.times[0]) + 1] < grid.alpha_bar[0] <= known[int(grid.times[0])]


def test_the_last_steps_of_a_grid():
    grid = grids.karras_grid(SCHEDULE, 9)
    assert grid.end(9) == grid
    last = grid.end(2)
    assert (last.times, last.alpha_bar) == (grid.times[7:], grid.alpha_bar[7:])
    assert last.alpha_bar_next == grid.alpha_bar_next[7:]
    level = grid.alpha_bar[3]
    assert grids.half_log_snr(level) == pytest.approx(0.5 * np.log(level / (1 - level)))


@pytest.mark.parametrize("spacing", [*SPACINGS, grids.time_uniform_grid])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(spacing, steps):
    with pytest.raises(UserError, match="1 to 1000"):
        spacing(torch.clone(SCHEDULE), steps)


# Spacings by diffusers' names

COUNTS = [*range(2, 51), 60, 75, 90, 100, 125, 200, 250, 333, 400, 500, 501]
TIES = {48, 96, 112}  # see `evenly_spaced_grid`: rounding errors of arange decide whether .5 is rounded up


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "cls"), [
    ("ddim", DDIMScheduler), ("plms", PNDMScheduler), ("euler", EulerDiscreteScheduler),
    ("heun", HeunDiscreteScheduler), ("dpm", DPMSolverMultistepScheduler),
    ("dpmpp_2m_sde", DPMSolverMultistepScheduler),
    ("unipc", UniPCMultistepScheduler)])
def test_evenly_spaced_timesteps_are_those_of_diffusers(name, cls, spacing):
    options = {"skip_prk_steps": True} if cls is PNDMScheduler else {}
    scheduler = cls(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                    timestep_spacing=spacing, **options)
    sampler = SAMPLER_CLASSES[name](TinyModel(convolution_network))
    for steps in COUNTS:
        scheduler.set_timesteps(steps)
        grid = sampler.spaced_grid(steps, spacing)
        times = scheduler.timesteps.tolist()
        if cls is PNDMScheduler:  # its first step looks ahead and starts again
            times = [*times[:1], *times[2:]]
        elif cls is HeunDiscreteScheduler:
            times = [*times[:1], *times[1::2]]
        ours = np.float32(grid.times).tolist() if name in ("euler", "heun") else list(grid.times)
        if spacing == "trailing" and steps in TIES:
            np.testing.assert_allclose(ours, times, atol=1)
        else:
            assert ours == times, steps
        if hasattr(scheduler, "sigmas") and cls is not HeunDiscreteScheduler and steps not in TIES:
            sigmas = np.sqrt((1 - np.array(grid.alpha_bar)) / np.array(grid.alpha_bar))
            np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1], rtol=1e-5)


@pytest.mark.parametrize(("name", "cls"), [("lcm", LCMScheduler), ("tcd", TCDScheduler)])
def test_timesteps_of_consistency_models_are_those_of_diffusers(name, cls):
    scheduler, sampler = cls(), SAMPLER_CLASSES[name](TinyModel(convolution_network))
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert list(sampler.make_grid(steps).times) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("rule", [grids.SpacingRule(), grids.SpacingRule(intervals=True),
                                  grids.SpacingRule(fractional=True, ends_clean=False)], ids=["s", "intervals", "ddim"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("timesteps", [20, 1000])
def test_every_spacing_gives_a_valid_grid_up_to_all_timesteps(spacing, rule, timesteps):
    schedule = diffusion_buffers("linear", timesteps, 0.00085, 0.012)["alphas_cumprod"]
    for steps in {1, 2, 3, 19, 20, timesteps // 2 + 1, timesteps - 1, timesteps}:
        grid = grids.evenly_spaced_grid(schedule, steps, spacing, rule)
        check(grid, steps, timesteps)
        assert grid.alpha_bar_next[-1] == (1 if rule.ends_clean or grid.times[-1] == 0 else schedule[0])
    with pytest.raises(UserError, match=f"1 to {timesteps}"):
        grids.evenly_spaced_grid(schedule, timesteps + 1, spacing, rule)


def test_middles_of_steps_lie_halfway_in_lambda():
    grid = grids.karras_grid(SCHEDULE, 5)
    levels = grids.with_midpoints(grid, SCHEDULE)
    assert len(levels) == 9 and levels.times[:5] == grid.times
    for i in range(4):
        start, end = grids.half_log_snr(grid.alpha_bar[i]), grids.half_log_snr(grid.alpha_bar_next[i])
        assert grids.half_log_snr(levels.alpha_bar[5 + i]) == pytest.approx((start + end) / 2)
        assert grid.times[i + 1] < levels.times[5 + i] < grid.times[i]
