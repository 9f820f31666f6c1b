"""DDIM and PLMS against diffusers' schedulers and against closed forms, on models of a few numbers."""
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import guided_denoiser, time_grid
from ldm.models.diffusion.schedule import diffusion_buffers, q_sample
from ldm.modules.context import PromptContext

SHAPE = (2, 6, 6)
BOTH = pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])


class TinyModel(nn.Module):
    """What a sampler sees of a LatentDiffusion; `network` (x, t, cond) -> output. Counts and keeps its calls."""

    def __init__(self, network: Callable[..., Tensor], parameterization: str = "eps", timesteps: int = 1000) -> None:
        super().__init__()
        for name, tensor in diffusion_buffers("linear", timesteps, 0.00085, 0.012).items():
            self.register_buffer(name, tensor)
        self.num_timesteps, self.parameterization, self.network = timesteps, parameterization, network
        self.calls: list[tuple[Tensor, Tensor, object]] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.calls.append((x, t, cond))
        return self.network(x, t, cond)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WEIGHT = torch.randn(2, 2, 3, 3, generator=seeded(11)) * 0.3


def convolution(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    """A smooth made-up network that reads all it is given."""
    clock = torch.sin(t.float() / 150).view(-1, 1, 1, 1)
    text = 0 if cond is None else cond.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(F.conv2d(x, WEIGHT, padding=1) + clock + text)


def gaussian(mean: float, std: float, parameterization: str, timesteps: int = 1000) -> TinyModel:
    """The exact denoiser of independent pixels N(mean, std^2)."""
    schedule = TinyModel(convolution, timesteps=timesteps)

    def network(x: Tensor, t: Tensor, cond: object) -> Tensor:
        kept = schedule.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        x0 = (mean * (1 - kept) + std**2 * kept.sqrt() * x) / (std**2 * kept + 1 - kept)
        eps = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        v = kept.sqrt() * eps - (1 - kept).sqrt() * x0
        return {"eps": eps, "v": v, "x0": x0}[parameterization].float()

    return TinyModel(network, parameterization, timesteps)


def flow(model: TinyModel, x: Tensor, steps: int, mean: float, std: float) -> Tensor:
    """Where the probability flow of N(mean, std^2) takes x: its standardized value never changes."""
    grid = time_grid(model, steps)
    first, last = grid.kept[0], grid.kept_after[-1]
    standard = (x - math.sqrt(first) * mean) / math.sqrt(first * std**2 + 1 - first)
    return math.sqrt(last) * mean + math.sqrt(last * std**2 + 1 - last) * standard


def start_noise(batch: int = 2, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(batch, *shape, generator=seeded(seed))


def diffusers_settings(**more: object) -> dict[str, object]:
    return {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading", **more,
    }


def diffusers_ddim(x: Tensor, steps: int, kind: str, eta: float, seeds: list[int]) -> Tensor:
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    scheduler = DDIMScheduler(**diffusers_settings(clip_sample=False, prediction_type=names[kind]))
    scheduler.set_timesteps(steps)
    sources = [seeded(seed) for seed in seeds]
    for t in scheduler.timesteps:
        noise = torch.stack([torch.randn(SHAPE, generator=source) for source in sources]) if eta else None
        output = convolution(x, t.expand(len(x)))
        x = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_matches_diffusers(steps, kind, eta):
    x, seeds = start_noise(), [5, 6]
    got, _ = DDIMSampler(TinyModel(convolution, kind)).sample(
        steps, 2, SHAPE, x_T=x, eta=eta, generators=[seeded(s) for s in seeds], verbose=False
    )
    torch.testing.assert_close(got, diffusers_ddim(x, steps, kind, eta, seeds), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 3, 4, 10, 20, 50])
def test_plms_matches_diffusers(steps):
    """For eps only: of a v network diffusers extrapolates the velocities, PLMS as published the noise."""
    x = start_noise()
    got, _ = PLMSSampler(TinyModel(convolution)).sample(steps, 2, SHAPE, x_T=x, verbose=False)
    scheduler = PNDMScheduler(**diffusers_settings(skip_prk_steps=True))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(convolution(x, t.expand(len(x))), t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)


def test_plms_of_one_step_is_ddim():
    x = start_noise()
    results = [
        cls(TinyModel(convolution)).sample(1, 2, SHAPE, x_T=x, verbose=False)[0] for cls in (DDIMSampler, PLMSSampler)
    ]
    torch.testing.assert_close(*results)


@BOTH
def test_parameterization_does_not_matter_to_an_exact_denoiser(sampler):
    x = start_noise()
    results = [
        sampler(gaussian(0.5, 0.7, kind)).sample(20, 2, SHAPE, x_T=x, verbose=False)[0] for kind in ("eps", "v", "x0")
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-4)


def distance_from_flow(sampler: type, kind: str, steps: int) -> float:
    model, x = gaussian(0.8, 0.5, kind), start_noise()
    got, _ = sampler(model).sample(steps, 2, SHAPE, x_T=x, verbose=False)
    return (got - flow(model, x, steps, 0.8, 0.5)).abs().max().item()


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_flow_of_a_gaussian_is_followed(kind):
    """DDIM at first order: four times the steps, about a quarter of the error; PLMS is far nearer at equal steps."""
    ddim = [distance_from_flow(DDIMSampler, kind, steps) for steps in (25, 100, 400)]
    plms = [distance_from_flow(PLMSSampler, kind, steps) for steps in (25, 100)]
    assert 3 < ddim[0] / ddim[1] < 5 and 3 < ddim[1] / ddim[2] < 5
    assert ddim[2] < 0.02
    assert plms[0] < ddim[0] / 5 and plms[1] < 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_all_steps_of_the_schedule_recover_a_gaussian(eta):
    model = gaussian(-0.6, 0.4, "eps", timesteps=1000)
    generators = [seeded(3)]
    x, _ = DDIMSampler(model).sample(1000, 1, (1, 64, 64), eta=eta, generators=generators, verbose=False)
    assert x.mean().item() == pytest.approx(-0.6, abs=0.03)
    assert x.std().item() == pytest.approx(0.4, rel=0.05)


def test_full_eta_on_the_full_grid_is_ddpm():
    """One step of every pair of neighbours: mean and variance are those of q(x_{t-1} | x_t, x_0)."""
    model = TinyModel(convolution, "x0", timesteps=40)
    sampler = DDIMSampler(model)
    grid, denoise = time_grid(model, 40), guided_denoiser(model, None, None, 1.0)
    assert grid.times == tuple(range(39, -1, -1))
    x = start_noise()
    for noise in (torch.zeros_like(x), torch.ones_like(x)):
        step = sampler.make_step(denoise, grid, 1.0, lambda noise=noise: noise)
        for i, t in enumerate(grid.times):
            after, x0 = step(x, i)
            mean = model.posterior_mean_coef1[t] * x0 + model.posterior_mean_coef2[t] * x
            torch.testing.assert_close(after, mean + model.posterior_variance[t].sqrt() * noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 30, 333, 600, 999, 1000])
def test_any_number_of_steps_fits_the_schedule(steps):
    grid = time_grid(TinyModel(convolution), steps)
    assert len(grid) == len(set(grid.times)) == steps
    assert all(0 <= t < 1000 for t in grid.times)
    assert list(grid.times) == sorted(grid.times, reverse=True)
    assert all(after > kept for kept, after in zip(grid.kept, grid.kept_after, strict=True))


@BOTH
def test_the_same_seed_gives_the_same_images(sampler):
    model = TinyModel(convolution)
    eta = 1.0 if sampler is DDIMSampler else 0.0
    first, again, other = (
        sampler(model).sample(8, 1, SHAPE, eta=eta, generators=[seeded(s)], verbose=False)[0] for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.manual_seed(4)
    drawn, _ = sampler(model).sample(8, 1, SHAPE, eta=eta, verbose=False)
    torch.manual_seed(4)
    assert torch.equal(drawn, sampler(model).sample(8, 1, SHAPE, eta=eta, verbose=False)[0])


@BOTH
def test_an_image_depends_on_its_own_seed_only(sampler):
    eta = 0.8 if sampler is DDIMSampler else 0.0
    together, _ = sampler(TinyModel(convolution)).sample(
        6, 3, SHAPE, eta=eta, generators=[seeded(s) for s in (7, 8, 9)], verbose=False
    )
    for row, seed in enumerate((7, 8, 9)):
        alone, _ = sampler(TinyModel(convolution)).sample(
            6, 1, SHAPE, eta=eta, generators=[seeded(seed)], verbose=False
        )
        torch.testing.assert_close(together[row : row + 1], alone)


@BOTH
def test_guidance_of_one_is_no_guidance(sampler):
    cond, uncond = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    model = TinyModel(convolution)
    settings = {"x_T": start_noise(), "verbose": False}
    plain, _ = sampler(model).sample(6, 2, SHAPE, cond, **settings)
    at_one, _ = sampler(model).sample(6, 2, SHAPE, cond, unconditional_conditioning=uncond, **settings)
    assert torch.equal(plain, at_one)
    assert all(len(x) == 2 for x, _, _ in model.calls)
    for scale, lone in ((0.0, uncond), (1.0, cond)):
        guided, _ = sampler(model).sample(
            6, 2, SHAPE, cond, unconditional_conditioning=uncond, unconditional_guidance_scale=scale, **settings
        )
        torch.testing.assert_close(guided, sampler(model).sample(6, 2, SHAPE, lone, **settings)[0])


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_guidance_extrapolates_the_output(kind):
    """A network that is affine in its text is guided to what it says of the extrapolated text."""
    def affine(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return 0.5 * x + cond.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    cond, uncond = torch.full((2, 3, 4), 0.2), torch.full((2, 3, 4), -0.1)
    settings = {"x_T": start_noise(), "verbose": False}
    guided, _ = DDIMSampler(TinyModel(affine, kind)).sample(
        6, 2, SHAPE, cond, unconditional_conditioning=uncond, unconditional_guidance_scale=3.0, **settings
    )
    direct, _ = DDIMSampler(TinyModel(affine, kind)).sample(6, 2, SHAPE, uncond + 3 * (cond - uncond), **settings)
    torch.testing.assert_close(guided, direct, rtol=1e-4, atol=1e-4)


class TextLayer(nn.Module):
    """Reads a PromptContext as a cross-attention does; counts the projections that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
        self.projections = 0
        self.to_v.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.projections += 1

    def forward(self, x: Tensor, t: Tensor, cond: PromptContext) -> Tensor:
        _, values = cond.keys_values("only", self.to_k, self.to_v)
        return convolution(x, t) + values.mean(dim=1)[:, :, None, None]


@BOTH
@pytest.mark.parametrize("plain_tensor", [False, True])
def test_the_guidance_batch_is_built_once_and_its_keys_are_kept(sampler, plain_tensor, monkeypatch):
    joins = []
    original = PromptContext.cat
    monkeypatch.setattr(PromptContext, "cat", staticmethod(lambda parts: joins.append(parts) or original(parts)))
    layer = TextLayer()
    model = TinyModel(layer)
    cond, empty = PromptContext.plain(torch.randn(2, 3, 4)), torch.randn(2, 3, 4)
    uncond = empty if plain_tensor else PromptContext.plain(empty)
    sampler(model).sample(
        9, 2, SHAPE, cond, unconditional_conditioning=uncond, unconditional_guidance_scale=2.0, verbose=False
    )
    contexts = [context for _, _, context in model.calls]
    assert len(joins) == 1
    assert len(contexts) == (9 if sampler is DDIMSampler else 10)
    assert all(context is contexts[0] for context in contexts)
    torch.testing.assert_close(contexts[0].encoding, torch.cat([empty, cond.encoding]))
    assert layer.projections == 1


def test_nothing_stays_stored_in_the_callers_context():
    """Weights may change between two samplings, as during training."""
    layer = TextLayer()
    model, cond = TinyModel(layer), PromptContext.plain(torch.randn(2, 3, 4), cache=True)
    settings = {"x_T": start_noise(), "verbose": False}
    before, _ = DDIMSampler(model).sample(4, 2, SHAPE, cond, **settings)
    with torch.no_grad():
        layer.to_v.weight.add_(1)
    after, _ = DDIMSampler(model).sample(4, 2, SHAPE, cond, **settings)
    assert layer.projections == 2
    assert not torch.allclose(before, after)


def test_intermediates_and_callbacks():
    numbers, guesses = [], []
    x = start_noise()
    samples, kept = DDIMSampler(TinyModel(convolution)).sample(
        10, 2, SHAPE, x_T=x, log_every_t=4, verbose=False,
        callback=numbers.append, img_callback=lambda guess, i: guesses.append((guess, i)),
    )
    assert numbers == [i for _, i in guesses] == list(range(10))
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 5  # the noise, then steps 0, 1, 5 and 9
    assert torch.equal(kept["x_inter"][0], x) and torch.equal(kept["x_inter"][-1], samples)
    for place, i in enumerate((0, 1, 5, 9), start=1):
        assert torch.equal(kept["pred_x0"][place], guesses[i][0])


def test_progress_bar_can_be_turned_off(capfd):
    sampler = DDIMSampler(TinyModel(convolution))
    sampler.sample(3, 1, SHAPE, verbose=False)
    assert capfd.readouterr().err == ""
    sampler.sample(3, 1, SHAPE)
    assert "3/3" in capfd.readouterr().err


@BOTH
def test_a_mask_keeps_the_known_part(sampler):
    known = torch.full((2, *SHAPE), 0.3)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    model = gaussian(-0.9, 0.1, "eps")
    samples, _ = sampler(model).sample(
        50, 2, SHAPE, mask=mask, x0=known, generators=[seeded(1), seeded(2)], verbose=False
    )
    assert (samples[..., 3:] + 0.9).abs().mean() < 0.15
    # the first network input follows q(x_t | x_0) where the mask is 1, with noise that comes second from the generator
    sources = [seeded(1), seeded(2)]
    start, noise = (torch.stack([torch.randn(SHAPE, generator=s) for s in sources]) for _ in range(2))
    t = torch.full((2,), time_grid(model, 50).times[0])
    expected = torch.where(mask.bool(), q_sample(model, known, t, noise), start)
    torch.testing.assert_close(model.calls[0][0], expected)


def test_temperature_scales_the_noise_of_eta():
    model, settings = TinyModel(convolution), {"x_T": start_noise(), "verbose": False, "eta": 1.0}
    cold, _ = DDIMSampler(model).sample(8, 2, SHAPE, temperature=0.0, **settings)
    again, _ = DDIMSampler(model).sample(8, 2, SHAPE, temperature=0.0, **settings)
    warm, _ = DDIMSampler(model).sample(8, 2, SHAPE, **settings)
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
    "mask alone": ({"mask": torch.zeros(1, 1, 6, 6)}, "belong together"),
    "x0 shape": ({"mask": torch.zeros(1, 1, 6, 6), "x0": torch.zeros(1, 2, 6, 6)}, "x0 has shape"),
    "mask shape": ({"mask": torch.zeros(1, 1, 5, 6), "x0": torch.zeros(2, 2, 6, 6)}, "does not broadcast"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_what_cannot_be_sampled_is_refused_before_the_model_runs(case):
    changes, message = BAD_REQUESTS[case]
    model = TinyModel(convolution)
    with pytest.raises(UserError, match=message):
        DDIMSampler(model).sample(**{"S": 5, "batch_size": 2, "shape": SHAPE, "verbose": False, **changes})
    assert not model.calls


def test_plms_refuses_noise():
    with pytest.raises(UserError, match="eta must be 0"):
        PLMSSampler(TinyModel(convolution)).sample(5, 1, SHAPE, eta=0.5)


def test_unknown_parameters_and_parameterizations_are_refused():
    with pytest.raises(TypeError, match="guidence"):
        DDIMSampler(TinyModel(convolution)).sample(5, 1, SHAPE, guidence=2.0)
    with pytest.raises(UserError, match="eps, v, x0"):
        DDIMSampler(TinyModel(convolution, "score"))
