"""The Gaussian process and its reversed chain: closed forms, diffusers' DDPM, and the random numbers of the family."""
from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from test_latent_diffusion import images, latent_model, pixel_model, random_pair, unconditional_model
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.common.errors import UserError
from ldm.models.diffusion.ancestral_sampling import first_rows
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion

T = torch.tensor([0, 20, 49])


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_a_step_of_the_chain_equals_diffusers(parameterization: str) -> None:
    model = unconditional_model(parameterization=parameterization)
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[parameterization]
    reference = diffusers.DDPMScheduler(50, trained_betas=model.betas.numpy(), prediction_type=kind, clip_sample=True,
                                        variance_type="fixed_small_log")
    x, _ = random_pair(1, 3, 4, 4)
    for step in (49, 20):
        t = torch.tensor([step])
        torch.manual_seed(1)
        got, x0 = model.p_sample(x, None, t, clip_denoised=True, return_x0=True)
        torch.manual_seed(1)
        expected = reference.step(model.apply_model(x, t, None), step, x)
        torch.testing.assert_close(got, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_the_predictions_invert_each_other() -> None:
    model = pixel_model()
    x, noise = random_pair(3, 2, 4, 4)
    x_t, v = model.q_sample(x, T, noise), model.get_v(x, noise, T)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model.predict_start_from_noise(x_t, T, noise), x, **close)
    torch.testing.assert_close(model.predict_start_from_z_and_v(x_t, T, v), x, **close)
    torch.testing.assert_close(model.predict_eps_from_z_and_v(x_t, T, v), noise, **close)
    torch.testing.assert_close(model._predict_eps_from_xstart(x_t, T, x), noise, rtol=1e-2, atol=1e-2)


def test_moments_and_the_bits_of_the_prior() -> None:
    model = pixel_model()
    x, _ = random_pair(3, 2, 4, 4)
    mean, variance, log_variance = model.q_mean_variance(x, T)
    alpha_bar = model.alphas_cumprod[T].view(-1, 1, 1, 1)
    torch.testing.assert_close(mean, alpha_bar.sqrt() * x)
    torch.testing.assert_close(variance, 1 - alpha_bar)
    torch.testing.assert_close(log_variance.exp(), variance, rtol=1e-4, atol=1e-6)
    last = model.alphas_cumprod[-1]
    expected = kl_divergence(Normal(last.sqrt() * x, (1 - last).sqrt()), Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(model._prior_bpd(x), expected / math.log(2))


def test_the_posterior_follows_from_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), both Gaussian."""
    model, step = pixel_model(), 30
    x, noise = random_pair(1, 2, 4, 4)
    mean, variance, log_variance = model.q_posterior(x, noise, torch.tensor([step]))
    beta, before = model.betas[step].double(), model.alphas_cumprod[step - 1].double()
    precision = (1 - beta) / beta + 1 / (1 - before)
    expected = ((1 - beta).sqrt() / beta * noise.double() + before.sqrt() / (1 - before) * x.double()) / precision
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-5)
    assert float(variance) == pytest.approx(float(1 / precision), rel=1e-4)
    torch.testing.assert_close(log_variance.exp(), variance)


def test_a_new_schedule_replaces_the_old_one() -> None:
    model = latent_model()
    model.register_schedule(timesteps=20, linear_start=0.01, linear_end=0.02)
    assert model.num_timesteps == len(model.betas) == len(model.lvlb_weights) == 20
    assert (model.linear_start, model.linear_end) == (0.01, 0.02)


def test_an_overridden_schedule_is_used() -> None:
    class Flat(LatentDiffusion):
        def register_schedule(self, *args: Any, **kwargs: Any) -> None:
            super().register_schedule(given_betas=[0.1] * 7)

    assert latent_model(cls=Flat).betas.tolist() == pytest.approx([0.1] * 7)


# The whole chain


def chain_by_hand(model: LatentDiffusion, x: Tensor, c: Tensor, steps: int) -> list[Tensor]:
    states = [x]
    for i in reversed(range(steps)):
        t = torch.full((len(x),), i)
        mean, _, log_variance = model.q_posterior(
            model.predict_start_from_noise(states[-1], t, model.apply_model(states[-1], t, c)), states[-1], t)
        noise = torch.randn(x.shape)
        states.append(mean if i == 0 else mean + (0.5 * log_variance).exp() * noise)
    return states


@torch.no_grad()
def test_the_chain_takes_noise_from_the_global_generator_at_every_step() -> None:
    model, c = latent_model(log_every_t=20), torch.ones(2, 1, 1)
    torch.manual_seed(2)
    states = chain_by_hand(model, torch.randn(2, 3, 4, 4), c, 50)
    following = torch.rand(1)
    torch.manual_seed(2)
    got, kept = model.p_sample_loop(c, (2, 3, 4, 4), return_intermediates=True, verbose=False)
    assert torch.equal(torch.rand(1), following)
    torch.testing.assert_close(got, states[-1])
    expected = [states[0], states[1], states[10], states[30], states[50]]  # noise, then after t = 49, 40, 20 and 0
    for ours, theirs in zip(kept, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.manual_seed(2)
    assert torch.equal(model.sample(c, batch_size=2, verbose=False, eta=0.5), got)
    torch.manual_seed(2)
    assert torch.equal(model.sample_log(c, 2, False, None)[0], got)


@torch.no_grad()
def test_progressive_denoising_returns_predictions() -> None:
    model, c, calls = latent_model(log_every_t=20), torch.ones(3, 1, 1), []
    torch.manual_seed(2)
    x, predictions = model.progressive_denoising(c, (3, 4, 4), batch_size=2, verbose=False, start_T=30,
                                                 img_callback=lambda x, i: calls.append((i, x)))
    assert [i for i, _ in calls] == [*reversed(range(30))] and torch.equal(calls[-1][1], x)
    assert len(predictions) == 3  # after t = 29, 20 and 0
    torch.testing.assert_close(predictions[-1], x)  # the last step adds no noise


@torch.no_grad()
def test_a_mask_keeps_what_it_covers() -> None:
    model, c = latent_model(), torch.zeros(2, 1, 1)
    x0, start = random_pair(2, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    torch.manual_seed(2)
    x = model.p_sample_loop(c, (2, 3, 4, 4), x_T=start, mask=mask, x0=x0, timesteps=10, verbose=False)
    kept = model.q_sample(x0, torch.tensor([0, 0]), torch.zeros_like(x0))
    assert torch.allclose(x[..., :2], kept[..., :2], atol=0.06)
    assert not torch.allclose(x[..., 2:], x0[..., 2:], atol=0.1)
    with pytest.raises(UserError, match="mask: needs"):
        model.p_sample_loop(c, (2, 3, 4, 4), mask=mask, verbose=False)


def test_options_of_a_step() -> None:
    class Doubles:
        def modify_score(self, model: object, output: Tensor, x: Tensor, t: Tensor, c: Tensor, by: int) -> Tensor:
            return by * output

    model, (x, _) = latent_model(), random_pair(3, 3, 4, 4)
    c = torch.zeros(3, 1, 1)
    plain, doubled = (model.p_mean_variance(x, c, T, False, return_x0=True, score_corrector=corrector,
                                            corrector_kwargs={"by": 2})[3] for corrector in (None, Doubles()))
    expected = model.predict_start_from_noise(x, T, 2 * model.apply_model(x, T, c))
    assert torch.equal(doubled, expected) and not torch.equal(plain, doubled)
    same = model.p_sample(x[:1].expand(3, -1, -1, -1), c, torch.tensor([9, 9, 9]), repeat_noise=True)
    assert torch.equal(same[0], same[1])
    mean = model.p_mean_variance(x, c, T, False)[0]
    assert torch.equal(model.p_sample(x, c, T, temperature=0.0), mean)
    assert torch.equal(model.p_sample(x, c, T)[0], mean[0])  # timestep 0 adds no noise


def test_images_by_the_chain() -> None:
    model = pixel_model(log_every_t=20)
    torch.manual_seed(4)
    got, states = model.sample(batch_size=3, return_intermediates=True)
    assert got.shape == (3, 2, 4, 4) and got.abs().max() <= 1 + 1e-5 and len(states) == 5


@torch.no_grad()
def test_sample_log_uses_ddim() -> None:
    model, c = latent_model(), torch.ones(2, 1, 1)
    torch.manual_seed(3)
    got, _ = model.sample_log(c, 2, True, 5, eta=1.0)
    torch.manual_seed(3)
    assert torch.equal(got, DDIMSampler(model).sample(5, 2, (3, 4, 4), c, eta=1.0, verbose=False)[0])


def test_conditions_of_the_first_images() -> None:
    c = torch.arange(4.0)
    assert first_rows(None, 2) is None and first_rows(c, 2).tolist() == [0, 1]
    cut = first_rows({"c_crossattn": [c, c], "c_adm": c}, 3)
    assert [one.tolist() for one in cut["c_crossattn"]] == [[0, 1, 2]] * 2 and len(cut["c_adm"]) == 3


# Overridden methods are called


def test_a_training_step_goes_through_every_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Own(LatentDiffusion):
        def shared_step(self, batch: Any, **kwargs: Any) -> Any:
            calls.append("shared_step")
            return super().shared_step(batch, **kwargs)

        def get_input(self, batch: Any, k: str, *args: Any, **kwargs: Any) -> Any:
            calls.append("get_input")
            return super().get_input(batch, k, *args, **kwargs)

        def forward(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append("forward")
            return super().forward(x, c, *args, **kwargs)

        def p_losses(self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None) -> Any:
            calls.append("p_losses")
            return super().p_losses(x_start, cond, t, noise)

        def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
            calls.append("q_sample")
            return super().q_sample(x_start, t, noise)

        def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, return_ids: bool = False) -> Tensor:
            calls.append("apply_model")
            return super().apply_model(x_noisy, t, cond, return_ids)

        def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
            calls.append("get_loss")
            return 3 * super().get_loss(pred, target, mean)

    batch = {"image": images(), "caption": ["a", "abc"]}
    losses = []
    for model in (latent_model(), latent_model(cls=Own)):
        torch.manual_seed(1)
        monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
        losses.append(float(model.training_step(batch, 0).detach()))
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5)
    assert calls == ["shared_step", "get_input", "forward", "p_losses", "q_sample", "apply_model", "get_loss"]


def test_random_numbers_of_a_training_step_have_the_familys_order() -> None:
    model = latent_model()
    torch.manual_seed(1)
    t, noise = torch.randint(0, 50, (2,)), torch.randn(2, 3, 4, 4)
    expected = model.p_losses(images(), torch.tensor([[[1.0]], [[3.0]]]), t, noise)[0]
    torch.manual_seed(1)
    batch = {"image": images().movedim(1, -1), "caption": ["a", "abc"]}  # channels last, as in the family's data
    assert torch.equal(model.shared_step(batch)[0], expected)


def test_stages_are_built_by_overridable_methods() -> None:
    class Own(LatentDiffusion):
        def instantiate_cond_stage(self, config: Any) -> None:
            super().instantiate_cond_stage("__is_first_stage__")

    model = latent_model(cls=Own, cond_stage_key="image")
    assert model.cond_stage_model is model.first_stage_model
    z, c = model.get_input({"image": images()}, "image")
    assert torch.equal(z, images()) and torch.equal(c, images())


def test_two_batches_of_a_step_are_photos_and_the_super_category(monkeypatch: pytest.MonkeyPatch) -> None:
    model = latent_model(reg_weight=0.5)
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(model, "log_dict", lambda terms, **_: logged.update(terms))
    photos, others = ({"image": images(count), "caption": ["a"] * count} for count in (2, 3))
    torch.manual_seed(1)
    first, second = model.shared_step(photos)[0], model.shared_step(others)[0]
    torch.manual_seed(1)
    loss = model.training_step([photos, others], 0)
    assert torch.equal(loss, first + 0.5 * second) and torch.equal(logged["train/loss"], first.detach())
