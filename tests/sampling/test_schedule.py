"""The noise schedule against diffusers and Bayes' rule, and its conversions against each other."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.common.errors import UserError
from ldm.sampling.schedule import (
    add_noise,
    diffusion_buffers,
    get_v,
    lvlb_weights,
    prediction_from_output,
    q_sample,
)

NAMES = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
}
STEPS = torch.tensor([0, 1, 250, 500, 999])


@pytest.fixture(scope="module")
def buffers() -> dict[str, torch.Tensor]:
    return diffusion_buffers("linear", 1000, linear_start=0.00085, linear_end=0.012)


@pytest.fixture(scope="module")
def schedule(buffers: dict[str, torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**buffers)


@pytest.fixture(scope="module")
def reference() -> DDPMScheduler:
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def images(seed: int) -> torch.Tensor:
    return torch.randn(len(STEPS), 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_names_shapes_and_dtype(buffers):
    assert set(buffers) == NAMES
    assert all(tensor.shape == (1000,) and tensor.dtype == torch.float32 for tensor in buffers.values())
    assert all(torch.isfinite(tensor).all() for tensor in buffers.values())


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "scaled_linear"), ("sqrt_linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedules_match_diffusers(ours, theirs):
    buffers = diffusion_buffers(ours, 200, linear_start=0.001, linear_end=0.02)
    other = DDPMScheduler(200, beta_start=0.001, beta_end=0.02, beta_schedule=theirs)
    torch.testing.assert_close(buffers["betas"], other.betas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffers["alphas_cumprod"], other.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_posterior_is_bayes_rule(buffers):
    """As a function of x it is N(x_t; sqrt(1-b) x, b) N(x; sqrt(a') x_0, 1-a'), in float64, from the betas alone."""
    betas = diffusion_buffers("linear", 1000, linear_start=0.00085, linear_end=0.012)["betas"].double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    b, before = betas[1:], alpha_bar[:-1]
    precision = (1 - b) / b + 1 / (1 - before)
    expected = {
        "posterior_variance": 1 / precision,
        "posterior_mean_coef1": before.sqrt() / (1 - before) / precision,
        "posterior_mean_coef2": (1 - b).sqrt() / b / precision,
        "posterior_log_variance_clipped": -precision.log(),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(buffers[name][1:].double(), tensor, rtol=2e-5, atol=1e-7)
    assert buffers["posterior_variance"][0] == 0
    assert buffers["posterior_mean_coef1"][0] == 1


def test_v_posterior_moves_the_variance_to_beta():
    low, middle, high = (
        diffusion_buffers("linear", 50, v_posterior=share)["posterior_variance"] for share in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(high, diffusion_buffers("linear", 50)["betas"])
    torch.testing.assert_close(middle, (low + high) / 2)


def test_adding_noise_and_velocity_match_diffusers(schedule, reference):
    x, noise = images(0), images(1)
    torch.testing.assert_close(q_sample(schedule, x, STEPS, noise), reference.add_noise(x, noise, STEPS))
    torch.testing.assert_close(get_v(schedule, x, noise, STEPS), reference.get_velocity(x, noise, STEPS))


def test_conversions_invert_each_other(schedule):
    x, noise = images(2), images(3)
    x_t = q_sample(schedule, x, STEPS, noise)
    v = get_v(schedule, x, noise, STEPS)
    close = {"rtol": 1e-3, "atol": 1e-4}
    alpha_bar = schedule.alphas_cumprod[STEPS].view(-1, 1, 1, 1)
    for name, output in {"eps": noise, "v": v, "x0": x}.items():
        prediction = prediction_from_output(name, x_t, alpha_bar, output)
        torch.testing.assert_close(prediction.eps, noise, **close)
        torch.testing.assert_close(prediction.x0, x, **close)
        torch.testing.assert_close(add_noise(prediction, alpha_bar), x_t, **close)


def test_bound_weights_of_eps_are_the_divergence_of_posteriors(buffers, schedule):
    """An error of the output moves the posterior mean. Gaussians with means d apart diverge by d^2 / (2 variance)."""
    t = torch.tensor([1, 10, 500, 999])
    x_t = torch.zeros(len(t), 1, 1, 1)
    alpha_bar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    guess = prediction_from_output("eps", x_t, alpha_bar, torch.ones_like(x_t)).x0.flatten()
    shift = buffers["posterior_mean_coef1"][t] * guess
    expected = shift**2 / (2 * buffers["posterior_variance"][t])
    torch.testing.assert_close(lvlb_weights(buffers, "eps")[t], expected, rtol=1e-4, atol=0)


def test_bound_weights_of_x0_and_v_are_those_of_the_public_code(buffers):
    alpha_bar = buffers["alphas_cumprod"]
    expected = 0.5 * alpha_bar.sqrt() / (2 - alpha_bar)
    torch.testing.assert_close(lvlb_weights(buffers, "x0")[1:], expected[1:])
    assert lvlb_weights(buffers, "v").tolist() == [1.0] * len(alpha_bar)


def test_bound_weights_of_eps_match_ddpm(buffers):
    exact = {name: tensor.double() for name, tensor in buffers.items()}
    beta, alpha_bar, variance = exact["betas"], exact["alphas_cumprod"], exact["posterior_variance"]
    expected = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar))
    weights = lvlb_weights(buffers, "eps")
    torch.testing.assert_close(weights[1:].double(), expected[1:], rtol=1e-3, atol=0)
    assert weights[0] == weights[1]


def test_given_betas_replace_the_schedule():
    buffers = diffusion_buffers("unread", 7, given_betas=[0.1, 0.2, 0.5])
    torch.testing.assert_close(buffers["alphas_cumprod"], torch.tensor([0.9, 0.72, 0.36]))
    torch.testing.assert_close(buffers["alphas_cumprod_prev"], torch.tensor([1.0, 0.9, 0.72]))


@pytest.mark.parametrize("betas", [[], [0.1], [0.0, 0.1], [0.1, 1.0], [[0.1, 0.2]]])
def test_bad_betas_are_refused(betas):
    with pytest.raises(UserError, match="betas"):
        diffusion_buffers("linear", 10, given_betas=betas)


def test_bad_settings_are_refused(buffers):
    with pytest.raises(UserError, match="v_posterior"):
        diffusion_buffers("linear", 10, v_posterior=1.5)
    with pytest.raises(UserError, match="eps, v, x0"):
        lvlb_weights(buffers, "score")
    with pytest.raises(UserError, match="eps, v, x0"):
        prediction_from_output("score", images(0), 0.5, images(0))
