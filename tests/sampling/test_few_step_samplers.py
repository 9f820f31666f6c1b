"""The samplers of few-step models, UniPC and DPM-Solver++ SDE against diffusers' schedulers, in float64.

Both sides get the same schedule, network and noise. Schedulers keep their sigmas in 32 bits; those are replaced.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler, UniPCMultistepScheduler
from helpers.sampling_models import SAMPLER_CLASSES, SHAPE, WEIGHT, TinyModel, seeded_generator
from torch import Tensor

from ldm.common.errors import UserError
from ldm.sampling.consistency import boundary_scalings

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = ("leading", "trailing", "linspace")
SEEDS = (5, 6)
FEW = [4, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 2, 3, 8, 20))]
CLOSE = {"rtol": 1e-6, "atol": 1e-5}


def network(x: Tensor, t: Tensor, cond: object = None) -> Tensor:
    clock = torch.sin(t.double() / 150).view(-1, 1, 1, 1)
    return torch.tanh(torch.nn.functional.conv2d(x, WEIGHT.to(x), padding=1) + clock.to(x))


def exact_model(kind: str) -> TinyModel:
    model = TinyModel(network, kind)
    model.alphas_cumprod = model.alphas_cumprod.double()
    return model


def noise_of(seed: int) -> Tensor:
    return torch.randn(2, *SHAPE, generator=seeded_generator(seed), dtype=torch.float64)


def generators() -> list[torch.Generator]:
    return [seeded_generator(seed) for seed in SEEDS]


def fresh_noise(sources: list[torch.Generator]) -> Callable[[], Tensor]:
    """Return a source of the noise that our samplers take from the same generators, in 32 bits."""
    return lambda: torch.stack([torch.randn(SHAPE, generator=source, dtype=torch.float32) for source in sources])


def ours(name: str, kind: str, steps: int, **settings: Any) -> Tensor:
    return SAMPLER_CLASSES[name](exact_model(kind)).sample(
        steps, 2, SHAPE, verbose=False, generators=generators(), **settings)[0]


def exact(scheduler: Any, steps: int) -> Any:
    """Return a scheduler with timesteps set, and with its tables in 64 bits."""
    alpha_bar = exact_model("eps").alphas_cumprod
    scheduler.alphas_cumprod = alpha_bar
    scheduler.final_alpha_cumprod = alpha_bar.new_tensor(1.0)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        known = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()
        times = scheduler.timesteps[:1].tolist() + scheduler.timesteps[2::2].tolist()
        single = hasattr(scheduler, "noise_sampler")
        sigmas = np.interp(times if single else scheduler.timesteps.tolist(), np.arange(1000), known)
        sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
        repeats = torch.tensor([1, *([2 if single else 1] * (len(sigmas) - 2)), 1])
        scheduler.sigmas = sigmas.repeat_interleave(repeats)
    return scheduler


@pytest.mark.parametrize("steps", [*FEW, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("name", "cls", "eta"), [
    ("lcm", LCMScheduler, None), ("tcd", TCDScheduler, 0.3), ("tcd", TCDScheduler, 0.0), ("tcd", TCDScheduler, 1.0)])
def test_consistency_models(name, cls, eta, kind, steps, monkeypatch):
    scheduler = exact(cls(**SCHEDULE, prediction_type=PREDICTION_TYPES[kind]), steps)
    draw = fresh_noise(generators())
    monkeypatch.setattr(sys.modules[cls.__module__], "randn_tensor", lambda *_, **__: draw())
    x = noise_of(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x, **({} if eta is None else {"eta": eta})).prev_sample
    torch.testing.assert_close(ours(name, kind, steps, x_T=noise_of(0), eta=eta), x, **CLOSE)


@pytest.mark.parametrize("steps", FEW)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_unipc(spacing, kind, steps):
    settings = {} if spacing is None else {"timestep_spacing": spacing}
    scheduler = exact(UniPCMultistepScheduler(**SCHEDULE, prediction_type=PREDICTION_TYPES[kind], **settings), steps)
    default, x = torch.get_default_dtype(), noise_of(0)
    torch.set_default_dtype(torch.float64)  # it makes tensors of its own
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(ours("unipc", kind, steps, x_T=noise_of(0), timestep_spacing=spacing), x, **CLOSE)


@pytest.mark.parametrize("steps", FEW)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_multistep_sde(spacing, kind, steps):
    scheduler = exact(DPMSolverMultistepScheduler(
        **SCHEDULE, prediction_type=PREDICTION_TYPES[kind], timestep_spacing=spacing,
        algorithm_type="sde-dpmsolver++"), steps)
    draw, x = fresh_noise(generators()), noise_of(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x, variance_noise=draw()).prev_sample
    # The scheduler combines predictions in 32 bits.
    torch.testing.assert_close(ours("dpmpp_2m_sde", kind, steps, x_T=noise_of(0), timestep_spacing=spacing), x,
                               rtol=1e-5, atol=1e-5)


@pytest.fixture
def single_step_scheduler(monkeypatch: pytest.MonkeyPatch) -> type:
    """Diffusers' DPM++ SDE of k-diffusion; it needs torchsde only for its noise, which the test gives."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    return import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler


@pytest.mark.parametrize("steps", [FEW[0], *FEW[2:]])  # a single one starts elsewhere with linspace
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_single_step_sde(single_step_scheduler, spacing, kind, steps):
    scheduler = exact(single_step_scheduler(
        **SCHEDULE, prediction_type=PREDICTION_TYPES[kind], timestep_spacing=spacing), steps)
    motion = BrownianMotion(fresh_noise(generators()))
    scheduler.noise_sampler = motion
    x = noise_of(0) * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(2))
        x = scheduler.step(output, t, x).prev_sample
    got = ours("dpmpp_sde", kind, steps, x_T=noise_of(0), timestep_spacing=spacing)
    torch.testing.assert_close(got, x, **CLOSE)


class BrownianMotion:
    """Increments of a Brownian motion over a step's first half and over the whole step, scaled to unit variance."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        self.draw, self.position, self.walked = draw, None, None

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        if self.position is None:  # the first half
            self.position, self.walked = end, self.draw() * (start - end).sqrt()
            return self.walked / (start - end).sqrt()
        whole = self.walked + self.draw() * (self.position - end).sqrt()
        self.position = None
        return whole / (start - end).sqrt()


@pytest.mark.parametrize(("name", "scheduler"), [
    ("lcm", LCMScheduler(**SCHEDULE)), ("tcd", TCDScheduler(**SCHEDULE)),
    ("unipc", UniPCMultistepScheduler(**SCHEDULE)),
    ("dpmpp_2m_sde", DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="sde-dpmsolver++",
                                                 timestep_spacing="trailing"))])
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.75])
def test_from_an_image(name, scheduler, strength, monkeypatch):
    steps, original = 8, noise_of(3)
    scheduler, skipped = exact(scheduler, steps), steps - round(strength * steps)
    draw = fresh_noise(generators())
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: draw(), raising=False)
    time = scheduler.timesteps[skipped]
    level = scheduler.alphas_cumprod[int(time)]
    x = level.sqrt() * original + (1 - level).sqrt() * noise_of(4)
    scheduler.set_begin_index(skipped)
    options = {"variance_noise": None} if name == "dpmpp_2m_sde" else {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for t in scheduler.timesteps[skipped:]:
            if options:
                options["variance_noise"] = draw()
            x = scheduler.step(network(x, t.expand(2)), t, x, **options).prev_sample
    finally:
        torch.set_default_dtype(default)
    got = ours(name, "eps", steps, x0=original, x_T=noise_of(4), strength=strength,
               timestep_spacing="trailing" if name == "dpmpp_2m_sde" else None)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_the_boundary_condition_of_consistency_models():
    """At time 0 the function is the identity, and far from it the prediction itself."""
    assert boundary_scalings(0) == (1.0, 0.0)
    skip, out = boundary_scalings(999)
    assert skip < 1e-8 and out == pytest.approx(1)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_consistency_models_have_steps_and_timesteps_of_their_own(name):
    label = SAMPLER_CLASSES[name].label
    with pytest.raises(UserError, match=f"51 sampling steps: {label} takes 1 to 50; 4 to 8 are usual"):
        ours(name, "eps", 51)
    with pytest.raises(UserError, match=f"{label} has timesteps of its own; leave timestep_spacing out"):
        ours(name, "eps", 4, timestep_spacing="trailing")
    few = SAMPLER_CLASSES[name](TinyModel(network, "eps", timesteps=20))
    assert few.make_grid(20).times == tuple(range(19, -1, -1))
    with pytest.raises(UserError, match="consistency models take 1 to 20"):
        few.make_grid(21)
