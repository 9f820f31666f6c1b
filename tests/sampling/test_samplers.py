"""Every sampler: closed forms, guidance, seeds, masks, strength, bad arguments."""
from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.oracles import randomize
from helpers.sampling_models import (
    DETERMINISTIC,
    SAMPLER_CLASSES,
    SHAPE,
    TinyModel,
    convolution_network,
    gaussian_denoiser,
    seeded_generator,
    start_noise,
)
from helpers.tiny_models import unet_config
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext
from ldm.sampling.ddim import DDIM
from ldm.sampling.sampler import ddim_step, guided_denoiser
from ldm.sampling.schedule import Prediction, add_noise
from ldm.sampling.time_grid import TimeGrid
from ldm.util import instantiate_from_config

EVERY = pytest.mark.parametrize("name", SAMPLER_CLASSES)


def full_grid(name: str, steps: int, model: TinyModel | None = None) -> TimeGrid:
    return SAMPLER_CLASSES[name](model or TinyModel(convolution_network)).make_grid(steps)


def sample(
    name: str, model: TinyModel, steps: int = 8, batch: int = 2, cond: object = None, **settings: object
) -> Tensor:
    return SAMPLER_CLASSES[name](model).sample(steps, batch, SHAPE, cond, verbose=False, **settings)[0]


def flow(grid: TimeGrid, x: Tensor, mean: float, std: float) -> Tensor:
    """Return where the probability flow of N(mean, std^2) leads x: its standardized value never changes."""
    first, last = grid.alpha_bar[0], grid.alpha_bar_next[-1]
    standard = (x - math.sqrt(first) * mean) / math.sqrt(first * std**2 + 1 - first)
    return math.sqrt(last) * mean + math.sqrt(last * std**2 + 1 - last) * standard


@EVERY
def test_a_single_step_follows_its_prediction(name):
    model, x = TinyModel(convolution_network), start_noise()
    grid = full_grid(name, 1)
    prediction = guided_denoiser(model, grid, None, None, 1.0)(x, 0)
    torch.testing.assert_close(sample(name, model, 1, x_T=x), add_noise(prediction, grid.alpha_bar_next[0]))
    assert len(model.calls) == 2


@EVERY
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_a_denoiser_that_knows_its_image_reaches_it(name, kind):
    """Exactly, except for the noise of the first timestep, 0.03, at which the grid of latent diffusion ends."""
    known, x = start_noise(seed=5), start_noise()
    model, grid = gaussian_denoiser(known, 0.0, kind), full_grid(name, 12)
    got = sample(name, model, 12, x_T=x)
    if name in ("ddim", *DETERMINISTIC):  # the noise of the start does not change
        eps = (x - math.sqrt(grid.alpha_bar[0]) * known) / math.sqrt(1 - grid.alpha_bar[0])
        expected = add_noise(Prediction(eps, known), grid.alpha_bar_next[-1])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4)
    assert (got - known).abs().max() < (0.15 if name in ("ddim", "plms", "tcd") else 2e-4)


@EVERY
def test_an_exact_denoiser_gives_the_same_image_in_every_parameterization(name):
    x = start_noise()
    results = [sample(name, gaussian_denoiser(0.5, 0.7, kind), 20, x_T=x, eta=0.0) for kind in ("eps", "v", "x0")]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-4)


def distance_from_flow(name: str, kind: str, steps: int, spacing: str | None = None) -> float:
    model, x = gaussian_denoiser(0.8, 0.5, kind), start_noise()
    got = sample(name, model, steps, x_T=x, eta=0.0, timestep_spacing=spacing)
    grid = SAMPLER_CLASSES[name](model).spaced_grid(steps, spacing)
    return (got - flow(grid, x, 0.8, 0.5)).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_samplers_follow_the_flow_of_a_gaussian(kind):
    """First-order methods: four times the steps give about a quarter of the error. Higher orders are more accurate."""
    plain = {name: [distance_from_flow(name, kind, steps) for steps in (25, 100)] for name in ("ddim", "euler")}
    for few, many in plain.values():
        assert 3 < few / many < 5
    assert distance_from_flow("ddim", kind, 400) < 0.02
    for name, spacing in (("plms", None), ("heun", None), ("dpm", None), ("unipc", "karras")):
        few, many = (distance_from_flow(name, kind, steps, spacing) for steps in (25, 100))
        assert few < plain["ddim"][0] / 5 and many < 3e-3  # the last step, to a clean image, is of first order


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_all_steps_of_the_schedule_recover_a_gaussian(eta):
    model = gaussian_denoiser(-0.6, 0.4, "eps", timesteps=1000)
    generators = [seeded_generator(3)]
    x, _ = DDIM(model).sample(1000, 1, (1, 64, 64), eta=eta, generators=generators, verbose=False)
    assert x.mean().item() == pytest.approx(-0.6, abs=0.03)
    assert x.std().item() == pytest.approx(0.4, rel=0.05)


def test_full_eta_on_the_full_grid_is_ddpm():
    """The mean and variance of each step are those of q(x_{t-1} | x_t, x_0)."""
    model = TinyModel(convolution_network, "x0", timesteps=40)
    grid = full_grid("ddim", 40, model)
    denoise = guided_denoiser(model, grid, None, None, 1.0)
    assert grid.times == tuple(range(39, -1, -1))
    x = start_noise()
    for noise in (torch.zeros_like(x), torch.ones_like(x)):
        step = ddim_step(denoise, grid, 1.0, lambda noise=noise: noise)
        for i, t in enumerate(grid.times):
            x_next, x0 = step(x, i)
            mean = model.posterior_mean_coef1[t] * x0 + model.posterior_mean_coef2[t] * x
            expected = mean + model.posterior_variance[t].sqrt() * noise
            torch.testing.assert_close(x_next, expected, rtol=1e-3, atol=1e-4)


@EVERY
def test_the_same_seed_gives_the_same_images(name):
    model = TinyModel(convolution_network)
    first, again, other = (sample(name, model, batch=1, generators=[seeded_generator(s)]) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.manual_seed(4)
    unseeded = sample(name, model)
    torch.manual_seed(4)
    assert torch.equal(unseeded, sample(name, model))


@EVERY
def test_an_image_depends_only_on_its_own_seed_prompt_and_original(name):
    rows = [{"seed": seed, "cond": torch.randn(1, 3, 4, generator=seeded_generator(seed)), "x0": start_noise(1, seed)}
            for seed in (7, 8, 9)]
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :2] = 1

    def sample_rows(chosen: list[dict]) -> Tensor:
        cond, x0 = (torch.cat([row[key] for row in chosen]) for key in ("cond", "x0"))
        return sample(
            name, TinyModel(convolution_network), 6, len(chosen), cond, x0=x0, strength=0.7, mask=mask,
            unconditional_conditioning=torch.zeros_like(cond), unconditional_guidance_scale=2.0,
            eta=0.8 if SAMPLER_CLASSES[name].supports_eta else None,
            generators=[seeded_generator(row["seed"]) for row in chosen])

    together = sample_rows(rows)
    for row, alone in enumerate(rows):
        torch.testing.assert_close(together[row : row + 1], sample_rows([alone]))


@EVERY
def test_guidance_scale_one_means_no_guidance(name):
    cond, uncond = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    model = TinyModel(convolution_network)
    settings = {"x_T": start_noise(), "eta": 0.0}
    plain = sample(name, model, 6, cond=cond, **settings)
    at_one = sample(name, model, 6, cond=cond, unconditional_conditioning=uncond, **settings)
    assert torch.equal(plain, at_one)
    assert all(len(x) == 2 for x, _, _ in model.calls)
    for scale, only in ((0.0, uncond), (1.0, cond)):
        guided = sample(name, model, 6, cond=cond, unconditional_conditioning=uncond,
                        unconditional_guidance_scale=scale, **settings)
        torch.testing.assert_close(guided, sample(name, model, 6, cond=only, **settings))


@EVERY
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_guidance_extrapolates_the_output(name, kind):
    """For a network that is affine in its text, guidance gives the output for the extrapolated text."""
    def affine(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return 0.5 * x + cond.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    cond, uncond = torch.full((2, 3, 4), 0.2), torch.full((2, 3, 4), -0.1)
    settings = {"x_T": start_noise(), "eta": 0.0}
    guided = sample(name, TinyModel(affine, kind), 6, cond=cond, unconditional_conditioning=uncond,
                   unconditional_guidance_scale=3.0, **settings)
    direct = sample(name, TinyModel(affine, kind), 6, cond=uncond + 3 * (cond - uncond), **settings)
    torch.testing.assert_close(guided, direct, rtol=1e-4, atol=1e-4)


@EVERY
def test_integer_timesteps_reach_the_network_as_integers(name):
    model = TinyModel(convolution_network)
    sample(name, model, 6)
    times = [t for _, t, _ in model.calls]
    assert all(t.shape == (2,) and 0 <= t[0] <= 999 and t[0] == t[1] for t in times)
    fractional = any(isinstance(time, float) for time in full_grid(name, 6).times)
    assert fractional or name not in ("dpm", "euler", "heun")
    assert {t.dtype for t in times} == ({torch.float32} if fractional else {torch.int64})
    assert len(times) == {"plms": 7, "heun": 11, "dpmpp_sde": 11}.get(name, 6)


class TextLayer(nn.Module):
    """Reads a PromptContext as cross-attention does, and records the values that were computed for it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
        self.computed: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: PromptContext) -> Tensor:
        _, values = cond.keys_values("only", self.to_k, self.to_v)
        if all(values is not known for known in self.computed):
            self.computed.append(values)
        return convolution_network(x, t) + values.mean(dim=1)[:, :, None, None]


@EVERY
@pytest.mark.parametrize("plain_tensor", [False, True])
def test_the_guidance_batch_is_built_once_and_caches_its_keys(name, plain_tensor, monkeypatch):
    batches = []
    original = PromptContext.cat
    record = staticmethod(lambda contexts: batches.append(contexts) or original(contexts))
    monkeypatch.setattr(PromptContext, "cat", record)
    layer = TextLayer()
    model = TinyModel(layer)
    cond, empty = PromptContext.plain(torch.randn(2, 3, 4)), torch.randn(2, 3, 4)
    uncond = empty if plain_tensor else PromptContext.plain(empty)
    sample(name, model, 9, cond=cond, unconditional_conditioning=uncond, unconditional_guidance_scale=2.0)
    contexts = [context for _, _, context in model.calls]
    assert len(batches) == 1
    assert all(context is contexts[0] for context in contexts)
    torch.testing.assert_close(contexts[0].encoding, torch.cat([empty, cond.encoding]))
    assert len(layer.computed) == 1


def test_the_callers_context_stays_without_cache():
    """Weights may change between two sampling runs, as during training."""
    layer = TextLayer()
    model, cond = TinyModel(layer), PromptContext.plain(torch.randn(2, 3, 4), cache=True)
    settings = {"x_T": start_noise(), "verbose": False}
    before, _ = DDIM(model).sample(4, 2, SHAPE, cond, **settings)
    with torch.no_grad():
        layer.to_v.weight.add_(1)
    after, _ = DDIM(model).sample(4, 2, SHAPE, cond, **settings)
    assert len(layer.computed) == 2
    assert not torch.allclose(before, after)


def test_intermediates_and_callbacks():
    indices, predictions = [], []
    x = start_noise()
    samples, intermediates = DDIM(TinyModel(convolution_network)).sample(
        10, 2, SHAPE, x_T=x, log_every_t=4, verbose=False,
        callback=indices.append, img_callback=lambda pred_x0, i: predictions.append((pred_x0, i)),
    )
    assert indices == [i for _, i in predictions] == list(range(10))
    assert len(intermediates["x_inter"]) == len(intermediates["pred_x0"]) == 5  # the noise, then steps 0, 1, 5 and 9
    assert torch.equal(intermediates["x_inter"][0], x) and torch.equal(intermediates["x_inter"][-1], samples)
    for position, i in enumerate((0, 1, 5, 9), start=1):
        assert torch.equal(intermediates["pred_x0"][position], predictions[i][0])


def test_progress_bar_can_be_turned_off(capfd):
    sampler = DDIM(TinyModel(convolution_network))
    sampler.sample(3, 1, SHAPE, verbose=False)
    assert capfd.readouterr().err == ""
    sampler.sample(3, 1, SHAPE)
    assert "3/3" in capfd.readouterr().err


def test_the_unet_accepts_fractional_timesteps():
    network = randomize(instantiate_from_config(unet_config(context_dim=4))).eval()
    x = torch.randn(1, 4, 8, 8, generator=seeded_generator(1))
    text = torch.randn(1, 3, 4, generator=seeded_generator(2))
    with torch.no_grad():
        integer, same, later, much_later = (network(x, torch.tensor([t]), text) for t in (600, 600.0, 600.01, 600.5))
    assert torch.equal(integer, same)
    assert 0 < (later - integer).abs().max() < (much_later - integer).abs().max()


@EVERY
def test_a_mask_keeps_the_known_region(name):
    known = torch.full((2, *SHAPE), 0.3)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    model = gaussian_denoiser(-0.9, 0.1)
    samples = sample(name, model, 50, mask=mask, x0=known, generators=[seeded_generator(1), seeded_generator(2)])
    assert torch.equal(samples[..., :3], known[..., :3])
    assert (samples[..., 3:] + 0.9).abs().mean() < 0.15
    # Where the mask is 1, the first network input follows q(x_t | x_0), with the generator's second noise.
    sources = [seeded_generator(1), seeded_generator(2)]
    start, noise = (torch.stack([torch.randn(SHAPE, generator=s) for s in sources]) for _ in range(2))
    expected = torch.where(mask.bool(), noised_at_first_step(name, 50, known, noise), start)
    torch.testing.assert_close(model.calls[0][0], expected)


def noised_at_first_step(name: str, steps: int, x0: Tensor, noise: Tensor) -> Tensor:
    alpha_bar = full_grid(name, steps).alpha_bar[0]
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise


@EVERY
def test_strength_runs_the_last_steps_from_the_noised_original(name):
    original, model = start_noise(seed=6), TinyModel(convolution_network)
    indices = []
    sample(name, model, 20, x0=original, strength=0.3, callback=indices.append,
           generators=[seeded_generator(1), seeded_generator(2)])
    assert indices == list(range(6))
    grid = full_grid(name, 20)
    first, t, _ = model.calls[0]
    noise = torch.cat([torch.randn(1, *SHAPE, generator=seeded_generator(seed)) for seed in (1, 2)])
    assert t[0].item() == pytest.approx(grid.times[14])
    torch.testing.assert_close(first, grid.alpha_bar[14] ** 0.5 * original + (1 - grid.alpha_bar[14]) ** 0.5 * noise)
    assert model.calls[-1][1][0].item() == pytest.approx(grid.times[19])


@EVERY
def test_full_strength_runs_all_steps_and_low_strength_stays_close(name):
    original, model = start_noise(seed=6), gaussian_denoiser(0.0, 1.0)

    def sample_20(**settings: object) -> Tensor:
        eta = 0.0 if name in ("lcm", "tcd") else None  # with new noise in each step, half the strength forgets all
        return sample(name, model, 20, eta=eta, generators=[seeded_generator(1), seeded_generator(2)], **settings)

    assert torch.equal(sample_20(x0=original, strength=1.0), sample_20())
    distances = [(sample_20(x0=original, strength=strength) - original).abs().mean().item()
                 for strength in (0.001, 0.3, 0.6, 1.0)]
    assert distances == sorted(distances) and distances[0] < 0.2 and distances[3] > 0.8


def test_temperature_scales_the_noise_of_eta():
    model, settings = TinyModel(convolution_network), {"x_T": start_noise(), "verbose": False, "eta": 1.0}
    cold, _ = DDIM(model).sample(8, 2, SHAPE, temperature=0.0, **settings)
    again, _ = DDIM(model).sample(8, 2, SHAPE, temperature=0.0, **settings)
    warm, _ = DDIM(model).sample(8, 2, SHAPE, **settings)
    assert torch.equal(cold, again)
    assert not torch.allclose(cold, warm)


BAD_REQUESTS = {
    "no steps": ({"S": 0}, "1 to 1000"),
    "too many steps": ({"S": 1001}, "1 to 1000"),
    "eta": ({"eta": 1.2}, "eta"),
    "idle temperature": ({"temperature": 0.5}, "temperature"),
    "negative temperature": ({"temperature": -1.0, "eta": 1.0}, "temperature"),
    "log_every_t": ({"log_every_t": 0}, "log_every_t"),
    "shape": ({"shape": (2, 0, 4)}, r"\(C, H, W\)"),
    "batch": ({"batch_size": 0}, r"\(C, H, W\)"),
    "x_T": ({"x_T": torch.zeros(1, 2, 6, 6)}, "x_T"),
    "conditioning": ({"conditioning": torch.zeros(3, 3, 4)}, "batch_size is 2"),
    "scale alone": ({"unconditional_guidance_scale": 2.0}, "unconditional_conditioning"),
    "unlike shapes": (
        {
            "conditioning": torch.zeros(2, 3, 4), "unconditional_conditioning": torch.zeros(1, 3, 4),
            "unconditional_guidance_scale": 2.0,
        },
        "differ in shape",
    ),
    "generators": ({"generators": [torch.Generator()]}, "1 generators for 2 images"),
    "mask alone": ({"mask": torch.zeros(1, 1, 6, 6)}, "belongs together"),
    "strength alone": ({"strength": 0.5}, "belongs together"),
    "x0 alone": ({"x0": torch.zeros(2, *SHAPE)}, "belongs together"),
    "no strength": ({"x0": torch.zeros(2, *SHAPE), "strength": 0.0}, "above 0"),
    "too strong": ({"x0": torch.zeros(2, *SHAPE), "strength": 1.2}, "at most 1"),
    "x0 shape": ({"mask": torch.zeros(1, 1, 6, 6), "x0": torch.zeros(1, 2, 6, 6)}, "x0 has shape"),
    "mask shape": ({"mask": torch.zeros(1, 1, 5, 6), "x0": torch.zeros(2, 2, 6, 6)}, "does not broadcast"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_bad_arguments_are_refused_before_the_model_runs(name, case):
    changes, message = BAD_REQUESTS[case]
    model = TinyModel(convolution_network)
    if name == "euler_a":
        changes = {"eta": 0.0, **changes}
    with pytest.raises(UserError, match=message):
        SAMPLER_CLASSES[name](model).sample(**{"S": 5, "batch_size": 2, "shape": SHAPE, "verbose": False, **changes})
    assert not model.calls


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_refuse_noise(name):
    label = re.escape(SAMPLER_CLASSES[name].label)
    with pytest.raises(UserError, match=f"{label} adds no noise, so eta must be 0, not 0.5"):
        sample(name, TinyModel(convolution_network), eta=0.5)


def test_the_default_eta():
    def ancestral(**settings: object) -> Tensor:
        return sample("euler_a", TinyModel(convolution_network), x_T=start_noise(),
                      generators=[seeded_generator(1), seeded_generator(2)], **settings)

    noisy = {"euler_a": 1.0, "dpmpp_2m_sde": 1.0, "dpmpp_sde": 1.0, "lcm": 1.0, "tcd": 0.3}
    for name, cls in SAMPLER_CLASSES.items():
        assert cls.resolve_eta(None) == cls.default_eta == noisy.get(name, 0.0)
    assert torch.equal(ancestral(), ancestral(eta=1.0))


def test_unknown_parameters_and_parameterizations_are_refused():
    with pytest.raises(TypeError, match="guidence"):
        DDIM(TinyModel(convolution_network)).sample(5, 1, SHAPE, guidence=2.0)
    with pytest.raises(UserError, match="eps, v, x0"):
        DDIM(TinyModel(convolution_network, "score"))
