"""Every sampler against diffusers' scheduler of the same method, on the same network and noise."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from helpers.sampling_models import (
    SAMPLER_CLASSES,
    SHAPE,
    TinyModel,
    convolution_network,
    seeded_generator,
    start_noise,
)
from torch import Tensor

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Latent diffusion counts times from 1, S of them evenly spaced, and ends one training step before the last of them.
LATENT_DIFFUSION = {"steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False}
# Sigmas over the whole schedule need "linspace", with which diffusers' pipelines start from sigma_max times the noise.
# Here, as there with "leading", it is sqrt(1 + sigma_max^2) times, 0.2 % more; the tests give the same start to both.
KARRAS = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {**LATENT_DIFFUSION, "clip_sample": False}),
    "plms": (PNDMScheduler, {**LATENT_DIFFUSION, "skip_prk_steps": True}),
    "dpm": (DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, KARRAS),
    "heun": (HeunDiscreteScheduler, KARRAS),
    "euler_a": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def scheduler_of(name: str, kind: str, steps: int) -> Any:
    cls, settings = SETTINGS[name]
    scheduler = cls(**SCHEDULE, **settings, prediction_type=PREDICTION_TYPES[kind])
    scheduler.set_timesteps(steps)
    return scheduler


def network_times(scheduler: Any) -> Tensor:
    """Return the exact timesteps of a scheduler's sigmas. With Karras' sigmas diffusers' DPM-Solver rounds them."""
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler.timesteps
    return scheduler_of("euler", "eps", len(scheduler.timesteps)).timesteps


def theirs(scheduler: Any, x: Tensor, network: Callable[..., Tensor] = convolution_network, skipped: int = 0,
           **step_settings: Any) -> Tensor:
    """Run diffusers' loop from step `skipped` on, with x in the scheduler's own scale."""
    if hasattr(scheduler, "set_begin_index"):  # rounded timesteps may occur twice
        scheduler.set_begin_index(skipped)
    for t, exact in zip(scheduler.timesteps[skipped:], network_times(scheduler)[skipped:], strict=True):
        output = network(scheduler.scale_model_input(x, t), exact.expand(len(x)))
        x = scheduler.step(output, t, x, **step_settings).prev_sample
    return x


def to_scheduler_scale(scheduler: Any, x: Tensor) -> Tensor:
    """Return the start noise in the scale of schedulers that work on x_0 + sigma eps; unchanged for others."""
    if isinstance(scheduler, (EulerDiscreteScheduler, HeunDiscreteScheduler, EulerAncestralDiscreteScheduler)):
        return x * (1 + scheduler.sigmas.max() ** 2) ** 0.5
    return x


def ours(name: str, kind: str, steps: int, **settings: Any) -> Tensor:
    sampler = SAMPLER_CLASSES[name](TinyModel(convolution_network, kind))
    return sampler.sample(steps, 2, SHAPE, verbose=False, **settings)[0]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(("name", "kind"), [
    *((name, kind) for name in ("dpm", "euler", "heun") for kind in ("eps", "v")), ("dpm", "x0"), ("euler", "x0")])
def test_deterministic_samplers(name, kind, steps):
    x, scheduler = start_noise(), scheduler_of(name, kind, steps)
    expected = theirs(scheduler, to_scheduler_scale(scheduler, x))
    torch.testing.assert_close(ours(name, kind, steps, x_T=x), expected, **CLOSE)


@pytest.mark.parametrize("steps", [2, 3, 4, 10, 20, 50])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_plms(kind, steps):
    """Of a v network diffusers extrapolates the velocities, PLMS as published the noise: it is given the noise."""
    model, x = TinyModel(convolution_network), start_noise()

    def noise(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = model.alpha_bar(t).float()
        return alpha_bar.sqrt() * convolution_network(x, t) + (1 - alpha_bar).sqrt() * x

    expected = theirs(scheduler_of("plms", "eps", steps), x, convolution_network if kind == "eps" else noise)
    torch.testing.assert_close(ours("plms", kind, steps, x_T=x), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(steps, kind, eta):
    x, seeds = start_noise(), (5, 6)
    got = ours("ddim", kind, steps, x_T=x, eta=eta, generators=[seeded_generator(seed) for seed in seeds])
    sources, scheduler = [seeded_generator(seed) for seed in seeds], scheduler_of("ddim", kind, steps)
    expected = x
    for t in scheduler.timesteps:
        noise = torch.stack([torch.randn(SHAPE, generator=source) for source in sources]) if eta else None
        output = convolution_network(expected, t.expand(2))
        expected = scheduler.step(output, t, expected, eta=eta, variance_noise=noise).prev_sample
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_ancestral_euler(kind, steps):
    x, scheduler = start_noise(), scheduler_of("euler_a", kind, steps)
    got = ours("euler_a", kind, steps, x_T=x, generators=[seeded_generator(5), seeded_generator(6)])
    expected = theirs(scheduler, to_scheduler_scale(scheduler, x), generator=[seeded_generator(5), seeded_generator(6)])
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ancestral_euler_without_its_noise_is_euler(steps):
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = start_noise()
    expected = theirs(scheduler, to_scheduler_scale(scheduler, x))
    torch.testing.assert_close(ours("euler_a", "eps", steps, x_T=x, eta=0.0), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "plms"])
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8])
def test_img2img_start(name, strength):
    """As diffusers' image-to-image pipelines start. PNDM is left out: its steps start elsewhere."""
    steps, original, noise = 20, start_noise(seed=3), start_noise(seed=4)
    scheduler = scheduler_of(name, "eps", steps)
    skipped = (steps - int(strength * steps)) * scheduler.order
    start = scheduler.add_noise(original, noise, scheduler.timesteps[skipped].expand(2))
    fresh = {"generator": [seeded_generator(5), seeded_generator(6)]} if name == "euler_a" else {}
    got = ours(name, "eps", steps, x0=original, x_T=noise, strength=strength,
               generators=[seeded_generator(5), seeded_generator(6)])
    torch.testing.assert_close(got, theirs(scheduler, start, skipped=skipped, **fresh), **CLOSE)
