"""The LDM family's DDIM sampler: tables, random numbers in the family's order, conditions, image to image."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.sampling_models import SHAPE, FamilyTinyModel, convolution_network, seeded_generator, start_noise
from torch import Tensor

from ldm.common.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.context import PromptContext
from ldm.sampling.ddim import DDIM
from ldm.sampling.schedule import diffusion_buffers

SIZE = (2, *SHAPE)
BOTH = pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
TEXT, EMPTY_TEXT = (torch.randn(2, 5, 4, generator=seeded_generator(seed)) for seed in (21, 22))
GUIDANCE = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": EMPTY_TEXT}


def model_of(kind: str = "eps", timesteps: int = 1000, network=convolution_network) -> FamilyTinyModel:
    return FamilyTinyModel(network, kind, timesteps)


def scheduled(steps: int = 20, eta: float = 0.0, **model_settings) -> DDIMSampler:
    sampler = DDIMSampler(model_of(**model_settings))
    sampler.make_schedule(ddim_num_steps=steps, ddim_eta=eta, verbose=False)
    return sampler


def sample(sampler_class: type = DDIMSampler, steps: int = 20, cond: object = TEXT, **settings) -> Tensor:
    return sampler_class(model_of()).sample(steps, 2, SHAPE, cond, verbose=False, **settings)[0]


# Tables


@BOTH
@pytest.mark.parametrize(("steps", "visited"), [(10, 10), (30, 31), (75, 77), (600, 999), (1000, 999)])
def test_step_counts_are_the_familys(sampler_class, steps, visited):
    """An S that does not divide T gives more steps. Above T / 2, the family's last timestep does not exist."""
    sampler = sampler_class(model_of())
    sampler.make_schedule(steps, verbose=False)
    assert isinstance(sampler.ddim_timesteps, np.ndarray)
    assert sampler.ddim_timesteps.tolist() == list(range(1, 1000, 1000 // steps))[:visited]
    assert len(sampler.ddim_timesteps) == len(sampler.ddim_alphas) == visited


def test_tables_of_the_steps():
    sampler = scheduled(30, eta=0.5)
    levels, times = sampler.model.alphas_cumprod.double().numpy(), np.arange(1, 1000, 33)
    before, after = levels[times], np.append(levels[0], levels[times[:-1]])
    sigmas = 0.5 * np.sqrt((1 - after) / (1 - before)) * np.sqrt(1 - before / after)  # DDIM Eq. 16
    tables = {"ddim_alphas": before, "ddim_alphas_prev": after, "ddim_sigmas": sigmas,
              "ddim_sqrt_one_minus_alphas": np.sqrt(1 - before)}
    for name, expected in tables.items():
        np.testing.assert_allclose(np.asarray(getattr(sampler, name)), expected, rtol=1e-5)
    assert isinstance(sampler.ddim_alphas_prev, np.ndarray) and sampler.ddim_alphas_prev.dtype == np.float64
    assert sampler.ddim_sigmas.dtype == torch.float64 and sampler.ddim_alphas.dtype == torch.float32


def test_tables_of_all_timesteps():
    sampler, exact = scheduled(eta=1.0), diffusion_buffers("linear", 1000, 0.00085, 0.012)
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
                 "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
                 "sqrt_recipm1_alphas_cumprod"):
        torch.testing.assert_close(getattr(sampler, name), exact[name], rtol=2e-4, atol=1e-6)
    # At eta 1 the noise of a step is that of the posterior, DDPM Eq. 7.
    torch.testing.assert_close(sampler.ddim_sigmas_for_original_num_steps**2, exact["posterior_variance"],
                               rtol=1e-3, atol=1e-8)


def test_quadratic_spacing():
    sampler = DDIMSampler(model_of())
    sampler.make_schedule(5, "quad", verbose=False)
    assert sampler.ddim_timesteps.tolist() == [1, 51, 201, 451, 801]


def test_impossible_schedules_are_refused():
    model = model_of()
    for steps in (0, 1001):
        with pytest.raises(UserError, match="1 to 1000"):
            DDIMSampler(model).make_schedule(steps)
    model.num_timesteps = 900
    with pytest.raises(UserError, match="900 timesteps, but 1000"):
        DDIMSampler(model).make_schedule(10)


def test_attributes_of_the_constructor():
    model = model_of()
    sampler = DDIMSampler(model, "cosine", device="meta", anything=1)
    assert (sampler.model, sampler.schedule, sampler.ddpm_num_timesteps) == (model, "cosine", 1000)
    assert sampler.device == torch.device("meta")
    sampler.register_buffer("table", torch.ones(2))
    sampler.register_buffer("name", "word")
    assert sampler.table.device.type == "meta" and sampler.name == "word"
    assert DDIMSampler(model).device == torch.device("cpu")


# Samples and random numbers


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_those_of_the_pipelines_ddim(kind, eta):
    """From the same x_T, and at eta 1 with the same draws: for 20 steps the grids agree."""
    settings = {"eta": eta, "x_T": start_noise(), **GUIDANCE}
    samples = []
    for sampler in (DDIMSampler(model_of(kind)), DDIM(model_of(kind))):
        torch.manual_seed(4)
        samples.append(sampler.sample(20, 2, SHAPE, TEXT, verbose=False, **settings))
    torch.testing.assert_close(samples[0][0], samples[1][0], rtol=1e-4, atol=1e-4)
    for key, tensors in samples[1][1].items():
        torch.testing.assert_close(samples[0][1][key], tensors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_noise_is_drawn_at_every_step(eta):
    """Step by step with the family's formulas, also for the seed's next draw, which the next batch of a script is."""
    torch.manual_seed(3)
    got, following = sample(steps=30, eta=eta), torch.rand(1)
    torch.manual_seed(3)
    model, x = model_of(), torch.randn(SIZE)
    times = list(range(1, 1000, 33))
    for time, time_next in zip(times[::-1], [*times[-2::-1], 0], strict=True):
        level, level_next = (model.alphas_cumprod[t].double().item() for t in (time, time_next))
        eps = convolution_network(x, torch.full((2,), time), TEXT)
        x0 = (x - (1 - level) ** 0.5 * eps) / level**0.5
        sigma = eta * ((1 - level_next) / (1 - level) * (1 - level / level_next)) ** 0.5
        x = level_next**0.5 * x0 + (1 - level_next - sigma**2) ** 0.5 * eps + sigma * torch.randn(SIZE)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    assert following == torch.rand(1)


def test_a_mask_draws_before_the_step_and_leaves_the_last_one_alone():
    original, mask = start_noise(seed=8), (start_noise(seed=9)[:, :1] > 0).float()
    torch.manual_seed(3)
    got = sample(steps=10, mask=mask, x0=original)
    torch.manual_seed(3)
    sampler = scheduled(10)
    x = torch.randn(SIZE)
    for index, time in reversed(list(enumerate(sampler.ddim_timesteps))):
        level = sampler.model.alphas_cumprod[time].item()
        noisy = level**0.5 * original + (1 - level) ** 0.5 * torch.randn(SIZE)
        x = torch.where(mask == 1, noisy, x)
        x, _ = sampler.p_sample_ddim(x, TEXT, torch.full((2,), time), index)  # draws once
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_the_network_is_told_integer_timesteps():
    model = model_of()
    DDIMSampler(model).sample(30, 2, SHAPE, TEXT, **GUIDANCE)
    times = [t for _, t, _ in model.calls]
    assert [t.tolist() for t in times] == [[time] * 4 for time in range(991, 0, -33)]
    assert all(t.dtype == torch.int64 for t in times)


@BOTH
def test_callbacks_and_intermediates(sampler_class):
    indices, images = [], []
    x, intermediates = sampler_class(model_of()).sample(
        10, 2, SHAPE, TEXT, indices.append, None, lambda x0, i: images.append((i, x0)), log_every_t=4, verbose=False,
    )
    assert indices == [i for i, _ in images] == list(range(10))
    # The start, then the steps at indices 9 (the first), 8, 4 and 0
    assert len(intermediates["x_inter"]) == 5 and torch.equal(intermediates["x_inter"][-1], x)
    for kept, i in zip(intermediates["pred_x0"][1:], (0, 1, 5, 9), strict=True):
        assert torch.equal(kept, images[i][1])


# What the family accepts


@BOTH
def test_what_other_samplers_refuse_is_accepted(sampler_class, caplog):
    x_T = start_noise()
    expected = sample(sampler_class, x_T=x_T)
    assert torch.equal(sample(sampler_class, x_T=x_T, unconditional_guidance_scale=7.5), expected)
    assert torch.equal(sample(sampler_class, x_T=x_T, x0=x_T, normals_sequence=[1], unknown="ignored"), expected)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        sample(sampler_class, cond=TEXT[:1])
    assert "conditioning for 1 images, but batch_size is 2" in caplog.text


def test_an_eta_above_one_stays_finite():
    assert sample(eta=1.5).isfinite().all()


@BOTH
def test_a_mask_needs_an_original(sampler_class):
    with pytest.raises(UserError, match="x0"):
        sample(sampler_class, mask=torch.ones(1, 1, 6, 6))


def read_nested(x: Tensor, t: Tensor, cond: object) -> Tensor:
    """Call `convolution_network` with the sum of all tensors in a nested condition."""
    def total(part: object) -> Tensor:
        if isinstance(part, Tensor):
            return part
        return sum(total(one) for one in (part.values() if isinstance(part, dict) else part))

    return convolution_network(x, t, total(cond))


@BOTH
@pytest.mark.parametrize("nest", [
    lambda text: {"c_crossattn": [text / 2], "c_concat": [text / 4, text / 4]}, lambda text: {"c_adm": text},
    lambda text: [text / 4, 3 * text / 4],
], ids=["lists in a dict", "dict", "list"])
def test_nested_conditions_are_guided(sampler_class, nest):
    x_T = start_noise()
    expected = sample(sampler_class, x_T=x_T, **GUIDANCE)
    got, _ = sampler_class(model_of(network=read_nested)).sample(
        20, 2, SHAPE, nest(TEXT), x_T=x_T, verbose=False, unconditional_guidance_scale=3.0,
        unconditional_conditioning=nest(EMPTY_TEXT),
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_prompts_with_concepts_are_guided():
    def network(x: Tensor, t: Tensor, cond: PromptContext) -> Tensor:
        return convolution_network(x, t, cond.encoding)

    x_T = start_noise()
    got, _ = DDIMSampler(model_of(network=network)).sample(20, 2, SHAPE, PromptContext.plain(TEXT), x_T=x_T, **GUIDANCE)
    torch.testing.assert_close(got, sample(x_T=x_T, **GUIDANCE))


@pytest.mark.parametrize(("unconditional", "message"), [
    (EMPTY_TEXT, "same form"), ({"other": EMPTY_TEXT}, "has no text"), ({"text": [EMPTY_TEXT]}, "same form"),
])
def test_conditions_of_another_form_are_refused(unconditional, message):
    with pytest.raises(UserError, match=message):
        sample(cond={"text": TEXT}, unconditional_guidance_scale=2.0, unconditional_conditioning=unconditional)


def test_a_guidance_scale_for_each_step():
    x_T, scales = start_noise(), [1.0, 3.0, 3.0, 3.0, 1.0]
    model = model_of()
    settings = {"x_T": x_T, **GUIDANCE, "unconditional_guidance_scale": 9.0}
    DDIMSampler(model).sample(5, 2, SHAPE, TEXT, ucg_schedule=scales, **settings)
    assert [len(x) for x, _, _ in model.calls] == [2, 4, 4, 4, 2]
    with pytest.raises(UserError, match="4 scales for 5 steps"):
        sample(steps=5, ucg_schedule=scales[:4])


def test_overridden_steps_are_called():
    """Also those of CompVis' signature, without the parameters that Stability AI added."""
    class Mine(DDIMSampler):
        def p_sample_ddim(self, x, c, t, index, repeat_noise=False, use_original_steps=False, quantize_denoised=False,
                          temperature=1.0, noise_dropout=0.0, score_corrector=None, corrector_kwargs=None,
                          unconditional_guidance_scale=1.0, unconditional_conditioning=None):
            return x + 1, x

    assert torch.equal(sample(Mine, steps=4, x_T=torch.zeros(SIZE)), torch.full(SIZE, 4.0))


def test_a_model_without_parameterization_predicts_noise():
    model = model_of()
    del model.parameterization
    x_T = start_noise()
    assert torch.equal(DDIMSampler(model).sample(20, 2, SHAPE, TEXT, x_T=x_T)[0], sample(x_T=x_T))


# One step


def one_step(sampler: DDIMSampler, seed: int = 0, index: int = 3, **options) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    t = torch.full((2,), int(sampler.ddim_timesteps[index]))
    return sampler.p_sample_ddim(start_noise(seed=2), TEXT, t, index, **options)


def test_options_of_the_noise():
    sampler = scheduled(eta=1.0)
    sigma = sampler.ddim_sigmas[3].item()
    without, _ = one_step(sampler, temperature=0.0)
    torch.manual_seed(0)
    noise = torch.randn(SIZE)
    torch.testing.assert_close(one_step(sampler)[0], without + sigma * noise)
    torch.testing.assert_close(one_step(sampler, temperature=0.5)[0], without + sigma / 2 * noise)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(torch.randn(SIZE), p=0.4)
    torch.testing.assert_close(one_step(sampler, noise_dropout=0.4)[0], without + sigma * dropped)
    torch.manual_seed(0)
    repeated = torch.randn(1, *SHAPE)
    torch.testing.assert_close(one_step(sampler, repeat_noise=True)[0], without + sigma * repeated)


def test_options_of_the_prediction():
    class Doubled:
        def modify_score(self, model, e_t, x, t, c, factor):
            return e_t * factor

    sampler = scheduled()
    x, eps = start_noise(seed=2), convolution_network(start_noise(seed=2), torch.tensor([151, 151]), TEXT)
    level = sampler.ddim_alphas[3].item()
    _, x0 = one_step(sampler, score_corrector=Doubled(), corrector_kwargs={"factor": 2})
    torch.testing.assert_close(x0, (x - (1 - level) ** 0.5 * 2 * eps) / level**0.5)
    sampler.model.first_stage_model = SimpleNamespace(quantize=lambda z: (z.round(), None, None))
    x_next, x0 = one_step(sampler, quantize_denoised=True)
    level_next = sampler.ddim_alphas_prev[3]
    assert torch.equal(x0, x0.round())
    torch.testing.assert_close(x_next, level_next**0.5 * x0 + (1 - level_next) ** 0.5 * eps)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="predicts eps, not v"):
        one_step(scheduled(kind="v"), score_corrector=SimpleNamespace())
    with pytest.raises(NotImplementedError, match="PLMSSampler"):
        one_step(scheduled(), dynamic_threshold=1.0)


def test_velocities_are_converted_by_the_model_if_it_can():
    sampler = scheduled(kind="v")
    sampler.model.predict_eps_from_z_and_v = lambda x, t, v: torch.zeros_like(x)
    sampler.model.predict_start_from_z_and_v = lambda x, t, v: torch.ones_like(x)
    x_next, x0 = one_step(sampler)
    assert torch.equal(x0, torch.ones(SIZE))
    torch.testing.assert_close(x_next, torch.full(SIZE, sampler.ddim_alphas_prev[3] ** 0.5))


# All timesteps, and the last of them


def test_original_steps_are_all_timesteps():
    x_T = start_noise()
    sampler = scheduled(10, eta=0.0, timesteps=40)
    got, _ = sampler.ddim_sampling(TEXT, SIZE, x_T=x_T, ddim_use_original_steps=True)
    expected, _ = DDIM(model_of(timesteps=40)).sample(40, 2, SHAPE, TEXT, x_T=x_T, verbose=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    _, intermediates = sampler.ddim_sampling(TEXT, SIZE, ddim_use_original_steps=True, timesteps=6, log_every_t=1)
    assert len(intermediates["x_inter"]) == 7


def test_fewer_timesteps_are_the_cleanest_but_one():
    """As in the family, which leaves out one more than it is told to."""
    sampler = scheduled(20)
    sampler.ddim_sampling(TEXT, SIZE, timesteps=8)
    assert [int(t[0]) for _, t, _ in sampler.model.calls] == list(range(301, 0, -50))


# Image to image


def test_stochastic_encode():
    sampler, x0, t = scheduled(), start_noise(seed=5), torch.tensor([3, 12])
    for levels, options in ((sampler.ddim_alphas, {}), (sampler.alphas_cumprod, {"use_original_steps": True})):
        level = levels[t].view(2, 1, 1, 1)
        torch.manual_seed(1)
        got = sampler.stochastic_encode(x0, t, **options)
        torch.manual_seed(1)
        torch.testing.assert_close(got, level.sqrt() * x0 + (1 - level).sqrt() * torch.randn(SIZE))
        given = sampler.stochastic_encode(x0, t, noise=torch.zeros(SIZE), **options)
        torch.testing.assert_close(given, level.sqrt() * x0)


def test_decode_takes_the_last_steps():
    x, indices = start_noise(seed=5), []
    sampler = scheduled(eta=0.6)
    torch.manual_seed(2)
    got = sampler.decode(x, TEXT, 7, callback=indices.append, **GUIDANCE)
    torch.manual_seed(2)
    for index in range(6, -1, -1):
        t = torch.full((2,), 1 + 50 * index)
        x, _ = sampler.p_sample_ddim(x, TEXT, t, index, **GUIDANCE)
    assert torch.equal(got, x) and indices == list(range(7))
    assert torch.equal(sampler.decode(x, TEXT, t_start=0), x)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_decode_undoes_encode(kind):
    x0 = start_noise(seed=5)
    sampler = scheduled(kind=kind)
    latents, info = sampler.encode(x0, TEXT, 300, use_original_steps=True, **GUIDANCE)
    assert torch.equal(info["x_encoded"], latents) and info["intermediate_steps"] == []
    assert (latents - x0).abs().max() > 0.3
    back = sampler.decode(latents, TEXT, 300, use_original_steps=True, **GUIDANCE)
    assert (back - x0).abs().max() < 0.03


@pytest.mark.parametrize(("wanted", "kept"), [(None, []), (2, [0, 5, 8, 9]), (3, [0, 3, 6, 8, 9]), (99, [*range(10)])])
def test_intermediates_of_encode(wanted, kept):
    indices, sampler = [], scheduled()
    latents, info = sampler.encode(start_noise(), TEXT, 10, return_intermediates=wanted, callback=indices.append)
    assert info["intermediate_steps"] == kept and indices == list(range(10))
    assert len(info.get("intermediates", [])) == len(kept) and ("intermediates" in info) == (wanted is not None)
    if kept:
        assert torch.equal(info["intermediates"][-1], latents)


def test_encode_follows_the_tables():
    """The network is told the step's index, as in Stability AI's code."""
    sampler, x = scheduled(), start_noise()
    got, _ = sampler.encode(x, TEXT, 3)
    for i in range(3):
        before, after = sampler.ddim_alphas_prev[i], sampler.ddim_alphas[i].item()
        eps = convolution_network(x, torch.full((2,), i), TEXT)
        x = (after / before) ** 0.5 * x + after**0.5 * ((1 / after - 1) ** 0.5 - (1 / before - 1) ** 0.5) * eps
    torch.testing.assert_close(got, x)
    with pytest.raises(ValueError, match="from 0 to 20"):
        sampler.encode(x, TEXT, 21)
