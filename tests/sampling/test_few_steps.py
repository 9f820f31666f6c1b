"""All samplers with very few steps, spacings of timesteps, guidance rescale, and guidance 1."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from helpers.sampling_models import (
    SAMPLER_CLASSES,
    SHAPE,
    TinyModel,
    convolution_network,
    gaussian_denoiser,
    seeded_generator,
    start_noise,
)
from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext
from ldm.sampling.sampler import rescale_guidance
from ldm.sampling.schedule import diffusion_buffers
from ldm.sampling.spacings import TIMESTEP_SPACINGS

EVERY = pytest.mark.parametrize("name", SAMPLER_CLASSES)


def spacings_of(name: str) -> list[str | None]:
    return [None, *SAMPLER_CLASSES[name].spacings]


@EVERY
@pytest.mark.parametrize("steps", [1, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 4))])
def test_few_steps_work_from_noise_from_an_image_and_around_a_mask(name, steps):
    known, mask = start_noise(seed=3), torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    for spacing in spacings_of(name):
        for start in ({}, {"x0": known, "strength": 0.01}, {"x0": known, "mask": mask},
                      {"x0": known, "mask": mask, "strength": 0.6}):
            seen, previews = [], []
            x, _ = SAMPLER_CLASSES[name](TinyModel(convolution_network, "v")).sample(
                steps, 2, SHAPE, verbose=False, timestep_spacing=spacing, callback=seen.append,
                img_callback=lambda preview, i, to=previews: to.append(preview),
                generators=[seeded_generator(1), seeded_generator(2)], **start)
            assert len(seen) == len(previews) == max(1, round(steps * start.get("strength", 1)))
            assert all(preview.isfinite().all() for preview in [x, *previews])
            assert "mask" not in start or torch.equal(x[..., :3], known[..., :3])


@EVERY
def test_one_trailing_step_is_the_prediction_at_the_noisy_end(name):
    """Which is what distilled models are trained for."""
    model = gaussian_denoiser(start_noise(seed=5), 0.0, "v")
    spacing = "trailing" if SAMPLER_CLASSES[name].spacings else None
    x, _ = SAMPLER_CLASSES[name](model).sample(1, 2, SHAPE, verbose=False, timestep_spacing=spacing)
    assert (x - start_noise(seed=5)).abs().max() < 0.15 and [t[0].item() for _, t, _ in model.calls[:1]] == [999]


def test_spacings_that_a_sampler_cannot_use_are_refused():
    def sample(name: str, spacing: str) -> None:
        SAMPLER_CLASSES[name](TinyModel(convolution_network)).sample(4, 2, SHAPE, timestep_spacing=spacing)

    with pytest.raises(UserError, match="PLMS cannot use timestep_spacing 'karras'; choose one of leading, trailing"):
        sample("plms", "karras")
    with pytest.raises(UserError, match="DDIM does not know timestep_spacing 'even'; choose one of leading, trailing"):
        sample("ddim", "even")


def test_karras_is_a_spacing_of_all_other_samplers():
    grids = {name: cls(TinyModel(convolution_network)).spaced_grid(7, "karras")
             for name, cls in SAMPLER_CLASSES.items() if "karras" in cls.spacings}
    assert len(grids) == len(SAMPLER_CLASSES) - 3 and len(set(grids.values())) == 1
    assert "karras" in TIMESTEP_SPACINGS and grids["ddim"] == SAMPLER_CLASSES["dpm"](
        TinyModel(convolution_network)).make_grid(7)


def test_rescaled_guidance_is_that_of_diffusers():
    guided, prompt = start_noise(seed=1) * 3, start_noise(seed=2)
    for share in (0.0, 0.7, 1.0):
        torch.testing.assert_close(rescale_guidance(guided, prompt, share), rescale_noise_cfg(guided, prompt, share))
    torch.testing.assert_close(rescale_guidance(guided, prompt, 1.0).std((1, 2, 3)), prompt.std((1, 2, 3)))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_sde"])
def test_samplers_rescale_guidance(name):
    def by_text(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return convolution_network(x, t) * (1 + cond.mean(dim=(1, 2)).view(-1, 1, 1, 1))

    cond, uncond = torch.full((2, 3, 4), 0.5), torch.zeros(2, 3, 4)

    def sample(scale: float, rescale: float) -> Tensor:
        return SAMPLER_CLASSES[name](TinyModel(by_text, "v")).sample(
            5, 2, SHAPE, cond, verbose=False, x_T=start_noise(), unconditional_guidance_scale=scale, eta=0.0,
            unconditional_conditioning=uncond, guidance_rescale=rescale)[0]

    # Guidance scales this output; its standard deviation taken back, it is the prompt's own.
    torch.testing.assert_close(sample(4.0, 1.0), sample(1.0, 0.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(1.0, 1.0), sample(1.0, 0.0))
    assert not torch.allclose(sample(4.0, 0.0), sample(1.0, 0.0), atol=0.1)
    with pytest.raises(UserError, match="guidance_rescale 1.5 must be between 0"):
        sample(4.0, 1.5)


@EVERY
def test_guidance_1_evaluates_one_half_of_the_batch_with_all_parts_of_the_condition(name):
    """As for SDXL, whose prompts have a pooled vector and one of sizes as well."""
    seen = []

    def network(x: Tensor, t: Tensor, cond: PromptContext) -> Tensor:
        seen.append((len(x), len(t), cond.encoding.shape[0], cond.vector.shape))
        return convolution_network(x, t, cond.encoding) + cond.vector.mean()

    def context(seed: int) -> PromptContext:
        text = torch.randn(2, 3, 4, generator=seeded_generator(seed))
        return replace(PromptContext.plain(text), pooled=text[:, 0], vector=text[:, :2].reshape(2, 8))

    for scale, rows in ((1.0, 2), (3.0, 4)):
        seen.clear()
        SAMPLER_CLASSES[name](TinyModel(network)).sample(
            2, 2, SHAPE, context(1), verbose=False, unconditional_guidance_scale=scale,
            unconditional_conditioning=context(2))
        assert set(seen) == {(rows, rows, rows, (rows, 8))}


@pytest.mark.parametrize("name", ["plms", "heun", "dpm", "unipc", "euler"])
def test_trailing_steps_stay_accurate_on_schedules_that_end_in_almost_pure_noise(name):
    """Directions (eps) at the noisy end of the cosine schedule say nothing, and must not be extrapolated."""
    model = gaussian_denoiser(0.8, 0.5, "v")
    for key, tensor in diffusion_buffers("cosine", 1000).items():
        setattr(model, key, tensor)
    x = start_noise()
    got, _ = SAMPLER_CLASSES[name](model).sample(25, 2, SHAPE, verbose=False, x_T=x, timestep_spacing="trailing")
    assert (got - (0.8 + 0.5 * x)).abs().max() < 0.2
