"""Schedules, embeddings and small layers against closed forms."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules import util


def test_timestep_embedding() -> None:
    got = util.timestep_embedding(torch.tensor([0, 250]), 7, max_period=100)
    angles = [250 * 100 ** (-i / 3) for i in range(3)]
    expected = [[1, 1, 1, 0, 0, 0, 0], [*map(math.cos, angles), *map(math.sin, angles), 0]]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-4)


def test_beta_schedules() -> None:
    n, low, high = 50, 1e-3, 2e-2
    ramp = [low + (high - low) * i / (n - 1) for i in range(n)]
    roots = [math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * i / (n - 1) for i in range(n)]
    assert np.allclose(util.make_beta_schedule("linear", n, low, high), [root ** 2 for root in roots])
    assert np.allclose(util.make_beta_schedule("sqrt_linear", n, low, high), ramp)
    assert np.allclose(util.make_beta_schedule("sqrt", n, low, high), [math.sqrt(beta) for beta in ramp])
    cosine = util.make_beta_schedule("cosine", n)
    squares = [math.cos((t / n + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(n)]
    assert np.allclose(np.cumprod(1 - cosine)[:-1], [square / squares[0] for square in squares[1:]])
    assert cosine[-1] == 0.999
    assert np.array_equal(util.make_beta_schedule("squaredcos_cap_v2", n), cosine)
    with pytest.raises(UserError, match="cosine"):
        util.make_beta_schedule("quartic", n)


@pytest.mark.parametrize(("method", "steps", "of", "expected"), [
    ("uniform", 5, 1000, [1, 201, 401, 601, 801]), ("uniform", 1, 1000, [1]), ("uniform", 3, 10, [1, 4, 7, 10]),
    ("uniform", 4, 4, [1, 2, 3, 4]), ("quad", 4, 500, [1, 45, 178, 401]),
])
def test_ddim_timesteps(method: str, steps: int, of: int, expected: list[int]) -> None:
    assert util.make_ddim_timesteps(method, steps, of).tolist() == expected


@pytest.mark.parametrize(("method", "steps"), [("uniform", 0), ("uniform", 11), ("cubic", 5)])
def test_impossible_ddim_timesteps_are_refused(method: str, steps: int) -> None:
    with pytest.raises(UserError):
        util.make_ddim_timesteps(method, steps, 10)


def test_extract_into_tensor() -> None:
    got = util.extract_into_tensor(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0]), (2, 3, 4, 4))
    assert got.shape == (2, 1, 1, 1) and got.flatten().tolist() == [7, 5]


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_group_norm_computes_statistics_in_float32(mean: float) -> None:
    """In 16 bits, mean and deviation are rounded once, when they are stored: by half a step of 8 bits each."""
    norm = util.normalization(64).to(torch.bfloat16)
    x = ((torch.randn(2, 64, 32, 32) + mean) * 100).to(torch.bfloat16)
    got, exact = norm(x), F.group_norm(x.float(), 32, eps=1e-5)
    assert got.dtype == torch.bfloat16
    half_a_step = 2.0 ** -9
    allowed = half_a_step * (mean + 2 * exact.abs()) + half_a_step
    assert bool(((got.float() - exact).abs() <= allowed).all())


def test_group_norm_with_other_weights_computes_in_float32() -> None:
    """Only the output is rounded to 8 bits, which is an error of at most 2^-8 of it."""
    norm, x = util.normalization(64), torch.randn(2, 64, 4, 4).to(torch.bfloat16) * 100
    got, exact = norm(x), F.group_norm(x.double(), 32, eps=1e-5)
    assert torch.equal(got, F.group_norm(x.float(), 32, norm.weight, norm.bias, eps=1e-5).to(torch.bfloat16))
    assert bool(((got.double() - exact).abs() <= 2.0 ** -8 * exact.abs() + 1e-6).all())


def test_betas_of_a_given_alpha_bar() -> None:
    betas = util.betas_for_alpha_bar(4, lambda t: 1 - t, max_beta=0.9)
    assert np.allclose(betas, [1 / 4, 1 / 3, 1 / 2, 0.9])


def test_repeated_timesteps() -> None:
    assert util.timestep_embedding(torch.tensor([3, 5]), 2, repeat_only=True).tolist() == [[3, 3], [5, 5]]


def test_scaling_a_module() -> None:
    layer = torch.nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    assert util.scale_module(layer, 0.5) is layer and torch.equal(layer.weight, before / 2)


def test_two_conditions_at_once() -> None:
    double = {"target": "torch.nn.Upsample", "params": {"scale_factor": 2}}
    conditions = util.HybridConditioner(double, {"target": "torch.nn.Identity"})(torch.ones(1, 1, 2), "prompt")
    assert conditions["c_concat"][0].shape == (1, 1, 4) and conditions["c_crossattn"] == ["prompt"]


@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_in_the_familys_calling_form(recompute: bool) -> None:
    """Parameters get their gradients, whether they are named or not, trained or frozen."""
    layer, frozen = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    x, calls = torch.randn(2, 3, requires_grad=True), []

    def function(a: torch.Tensor, b: None) -> torch.Tensor:
        calls.append(b)
        return frozen(layer(a)).square()

    util.checkpoint(function, (x, None), [*layer.parameters(), *frozen.parameters()], recompute).sum().backward()
    assert len(calls) == (2 if recompute else 1)
    got = [x.grad, layer.weight.grad]
    expected = torch.autograd.grad(function(x, None).sum(), [x, layer.weight])
    assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True)) and frozen.weight.grad is None
