"""The edit against closed forms in float64, against identities, and against another implementation."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.modules.rank_one import (
    Basis,
    apply_edit,
    concept_basis,
    dual_vectors,
    energy,
    gate,
    invert_covariance,
    project_out,
    similarity,
)

WIDTH, INNER, BATCH, TOKENS = 12, 7, 2, 5
BIAS, TEMPERATURE = 0.7, 0.15


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_covariance(seed: int = 100) -> Tensor:
    """A covariance like that of text encodings, which share a direction and have axes of very different scales."""
    scale = torch.logspace(-1, 0.5, WIDTH)
    encodings = randn(400, WIDTH, seed=seed) * scale + 2 * scale
    return encodings.T @ encodings / len(encodings)


def edit_layer(encoding: Tensor, targets: Tensor, inverse: Tensor, weight: Tensor, outputs: Tensor) -> Tensor:
    """Compute one layer, as `Edit.context` and `PromptContext.keys_values` do."""
    count, duals = len(targets), dual_vectors(targets, inverse)
    gates = gate(similarity(encoding, targets, duals), torch.full((count,), BIAS), torch.full((count,), TEMPERATURE))
    projected = project_out(encoding, concept_basis(targets, duals))
    return apply_edit(projected, gates, weight, outputs)


def scores_of(encoding: Tensor, targets: Tensor, inverse: Tensor) -> Tensor:
    return similarity(encoding, targets, dual_vectors(targets, inverse))


def basis_of(targets: Tensor, inverse: Tensor) -> Basis:
    return concept_basis(targets, dual_vectors(targets, inverse))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def oracle(encoding: Tensor, targets: Tensor, inverse: Tensor, weight: Tensor, outputs: Tensor) -> np.ndarray:
    """Compute h token by token in float64, with u = L^-T Q from Q R = L^T [i*_1 ... i*_J] and L L^T = C^-1."""
    e, i, metric, w, o = (x.double().numpy() for x in (encoding, targets, inverse, weight, outputs))
    lower = np.linalg.cholesky(metric)
    basis = np.linalg.solve(lower.T, np.linalg.qr(lower.T @ i.T)[0])
    result = np.empty((*e.shape[:2], len(w)))
    for index in np.ndindex(*e.shape[:2]):
        token = e[index]
        e_perp = token - sum(u * (u @ metric @ token) for u in basis.T)
        scores = [i_j @ metric @ token / (i_j @ metric @ i_j) for i_j in i]
        gates = [sigmoid((s - BIAS) / TEMPERATURE) for s in scores]
        result[index] = w @ e_perp + sum(g * o_j for g, o_j in zip(gates, o, strict=True))
    return result


@pytest.fixture
def inverse() -> Tensor:
    return invert_covariance(make_covariance())


@pytest.fixture
def case(inverse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encodings, C^-1, W and two target outputs."""
    encoding = randn(BATCH, TOKENS, WIDTH, seed=1)
    return encoding, inverse, randn(INNER, WIDTH, seed=2), randn(2, INNER, seed=3)


# C^-1


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.1])
def test_the_inverse_is_that_of_the_ridged_covariance(ridge: float) -> None:
    covariance = make_covariance().double()
    expected = np.linalg.inv(covariance.numpy() + ridge * np.trace(covariance.numpy()) / WIDTH * np.eye(WIDTH))
    found = invert_covariance(covariance, ridge)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_the_ridge_makes_a_covariance_of_too_few_captions_invertible() -> None:
    few = randn(WIDTH // 2, WIDTH)
    covariance = few.T @ few
    with pytest.raises(ValueError, match="not positive definite"):
        invert_covariance(covariance - 1e-3 * torch.eye(WIDTH), ridge=0.0)
    inverse = invert_covariance(covariance)
    values = torch.linalg.eigvalsh(inverse.double())
    assert values[0] > 0
    assert values[-1] / values[0] < 1.01 * WIDTH / 1e-4  # the documented bound


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.ones(3), "square"),
        (torch.ones(3, 4), "square"),
        (torch.full((2, 2), torch.nan), "finite"),
        (torch.zeros(2, 2), "positive definite"),
        (-torch.eye(2), "positive definite"),
    ],
)
def test_invalid_covariances_are_refused(covariance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        invert_covariance(covariance)


# Closed forms


def test_one_concept_is_equation_3(case: tuple[Tensor, ...]) -> None:
    encoding, inverse, weight, outputs = case
    target = randn(1, WIDTH, seed=4)
    e, i, metric, w, o = (x.double() for x in (encoding, target[0], inverse, weight, outputs[0]))
    s = (e @ metric @ i) / (i @ metric @ i)
    expected = (e - s[..., None] * i) @ w.T + torch.sigmoid((s - BIAS) / TEMPERATURE)[..., None] * o
    found = edit_layer(encoding, target, inverse, weight, outputs[:1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4, 40])
def test_several_concepts_equal_the_cholesky_form(inverse: Tensor, count: int) -> None:
    arguments = (
        randn(BATCH, TOKENS, WIDTH, seed=5), randn(count, WIDTH, seed=6), inverse,
        randn(INNER, WIDTH, seed=7), randn(count, INNER, seed=8),
    )
    np.testing.assert_allclose(edit_layer(*arguments).numpy(), oracle(*arguments), rtol=1e-4, atol=1e-5)


def test_similarity_instead_of_the_gate_is_rome(case: tuple[Tensor, ...]) -> None:
    """ROME's rank-one update W' = W + (o* - W i*) (C^-1 i*)^T / ||i*||^2."""
    encoding, inverse, weight, outputs = case
    target = randn(1, WIDTH, seed=4)
    w, i, metric, o = weight.double(), target[0].double(), inverse.double(), outputs[0].double()
    updated = w + torch.outer(o - w @ i, metric @ i) / (i @ metric @ i)
    projected = project_out(encoding, basis_of(target, inverse))
    found = apply_edit(projected, scores_of(encoding, target, inverse), weight, outputs[:1])
    torch.testing.assert_close(found.double(), encoding.double() @ updated.T, rtol=1e-4, atol=1e-5)


def test_one_concept_equals_perfusion_pytorch() -> None:
    theirs = pytest.importorskip("perfusion_pytorch")
    covariance, target, output = make_covariance(), randn(1, WIDTH, seed=9), randn(1, INNER, seed=10)
    layer = torch.nn.Linear(WIDTH, INNER, bias=False)
    module = theirs.Rank1EditModule(
        layer, num_concepts=1, C=covariance, text_seq_len=TOKENS, eval_beta=BIAS, eval_temperature=TEMPERATURE
    ).eval()
    module.initted.fill_(True)
    module.ema_concept_text_encs.copy_(target)
    module.concept_outputs.data.copy_(output)
    encoding = torch.cat([randn(BATCH, TOKENS - 1, WIDTH, seed=11), target.expand(BATCH, 1, WIDTH)], dim=1)
    found = edit_layer(encoding, target, invert_covariance(covariance, ridge=0.0), layer.weight, output)
    torch.testing.assert_close(found, module(encoding, concept_id=0), rtol=1e-4, atol=1e-4)


# Identities


def test_an_open_gate_at_the_target_input_gives_the_target_output(case: tuple[Tensor, ...]) -> None:
    _, inverse, weight, outputs = case
    target = randn(1, WIDTH, seed=4)
    encoding = target[None]
    scores = scores_of(encoding, target, inverse)
    assert scores.item() == 1.0
    gates = gate(scores, torch.tensor([0.75]), torch.tensor([1e-3]))
    projected = project_out(encoding, basis_of(target, inverse))
    found = apply_edit(projected, gates, weight, outputs[:1])
    torch.testing.assert_close(found[0], outputs[:1], rtol=1e-5, atol=1e-5)


def test_an_orthogonal_encoding_with_a_closed_gate_does_not_change(case: tuple[Tensor, ...]) -> None:
    encoding, inverse, weight, outputs = case
    target = randn(1, WIDTH, seed=4)
    i, metric = target[0].double(), inverse.double()
    orthogonal = encoding.double() - ((encoding.double() @ metric @ i) / (i @ metric @ i))[..., None] * i
    scores = scores_of(orthogonal, target, inverse)
    torch.testing.assert_close(scores, torch.zeros_like(scores), rtol=0, atol=1e-6)
    gates = gate(scores, torch.tensor([0.75]), torch.tensor([1e-3]))
    projected = project_out(orthogonal.float(), basis_of(target, inverse))
    found = apply_edit(projected, gates, weight, outputs[:1])
    torch.testing.assert_close(found, orthogonal.float() @ weight.T, rtol=1e-5, atol=1e-5)


def test_one_concept_equals_the_same_concept_twice_with_half_the_output(case: tuple[Tensor, ...]) -> None:
    encoding, inverse, weight, outputs = case
    target = randn(1, WIDTH, seed=4)
    once = edit_layer(encoding, target, inverse, weight, outputs[:1])
    twice = edit_layer(encoding, target.repeat(2, 1), inverse, weight, outputs[:1].repeat(2, 1) / 2)
    assert len(basis_of(target.repeat(2, 1), inverse).vectors) == 1
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)


def test_no_concept_is_the_plain_projection(case: tuple[Tensor, ...]) -> None:
    encoding, inverse, weight, _ = case
    none = torch.empty(0, WIDTH)
    assert energy(none, dual_vectors(none, inverse)).shape == (0,)
    assert scores_of(encoding, none, inverse).shape == (BATCH, TOKENS, 0)
    assert basis_of(none, inverse).vectors.shape == (0, WIDTH)
    found = edit_layer(encoding, none, inverse, weight, torch.empty(0, INNER))
    assert torch.equal(found, encoding @ weight.T)


@pytest.mark.parametrize(("difference", "rank"), [(0.0, 1), (1e-7, 1), (1e-2, 2), (0.3, 2)])
def test_nearly_parallel_target_inputs(case: tuple[Tensor, ...], difference: float, rank: int) -> None:
    encoding, inverse, weight, outputs = case
    first = randn(WIDTH, seed=4)
    targets = torch.stack([first, first + difference * randn(WIDTH, seed=12)])
    assert len(basis_of(targets, inverse).vectors) == rank
    found = edit_layer(encoding, targets, inverse, weight, outputs)
    assert found.isfinite().all()
    if rank == 2:
        np.testing.assert_allclose(found.numpy(), oracle(encoding, targets, inverse, weight, outputs), atol=1e-3)
    else:
        mean = edit_layer(encoding, targets[:1], inverse, weight, outputs.sum(0, keepdim=True))
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)


def test_concepts_under_different_covariances_keep_their_own_inner_products(case: tuple[Tensor, ...]) -> None:
    """Closed form in float64: e_perp = e - I^T G^+ D e. No concept is left in it, although G is not symmetric."""
    encoding, inverse, _, _ = case
    targets = randn(3, WIDTH, seed=4)
    other = invert_covariance(make_covariance(seed=55) + 2 * torch.eye(WIDTH))
    duals = torch.cat([dual_vectors(targets[:2], inverse), dual_vectors(targets[2:], other)])
    e, i, d = (x.double() for x in (encoding, targets, duals))
    gram = d @ i.T
    assert (gram - gram.T).abs().max() > 0.1
    expected = e - e @ d.T @ torch.linalg.inv(gram).T @ i
    found = project_out(encoding, concept_basis(targets, duals))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert similarity(found, targets, duals).abs().max() < 1e-4
    # The same direction under both counts once.
    twice = concept_basis(targets[:1].repeat(2, 1), torch.cat([duals[:1], dual_vectors(targets[:1], other)]))
    assert len(twice.vectors) == 1


@pytest.mark.parametrize("targets", [torch.zeros(1, WIDTH), torch.full((1, WIDTH), torch.nan)])
def test_a_target_input_without_energy_is_refused(inverse: Tensor, targets: Tensor) -> None:
    with pytest.raises(ValueError, match="energy"):
        scores_of(torch.ones(1, 1, WIDTH), targets, inverse)


def test_duals_of_another_shape_are_refused(inverse: Tensor) -> None:
    with pytest.raises(ValueError, match="duals must have the shape"):
        similarity(torch.ones(1, 1, WIDTH), torch.ones(1, WIDTH), inverse)


# Properties


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 5))
def test_the_basis_is_orthonormal_and_the_projection_removes_every_concept(seed: int, count: int) -> None:
    inverse, targets = invert_covariance(make_covariance(seed)), randn(count, WIDTH, seed=seed)
    basis = basis_of(targets, inverse)
    gram = basis.vectors.double() @ inverse.double() @ basis.vectors.double().T
    torch.testing.assert_close(gram, torch.eye(count).double(), rtol=0, atol=1e-4)
    encoding = randn(BATCH, TOKENS, WIDTH, seed=seed + 1)
    projected = project_out(encoding, basis)
    assert scores_of(projected, targets, inverse).abs().max() < 1e-3
    torch.testing.assert_close(project_out(projected, basis), projected, rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-3, 1e3), factor=st.floats(-3, 3))
def test_similarity_is_linear_and_independent_of_the_scale_of_c(seed: int, scale: float, factor: float) -> None:
    covariance, targets = make_covariance(seed), randn(3, WIDTH, seed=seed)
    inverse = invert_covariance(covariance)
    encoding = randn(BATCH, TOKENS, WIDTH, seed=seed + 1)
    scores = scores_of(encoding, targets, inverse)
    rescaled = scores_of(encoding, targets, invert_covariance(covariance * scale))
    torch.testing.assert_close(rescaled, scores, rtol=1e-3, atol=1e-3)
    at_targets = scores_of(factor * targets[None], targets, inverse)[0].diagonal()
    torch.testing.assert_close(at_targets, torch.full((3,), factor), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), order=st.permutations(range(3)))
def test_the_order_of_concepts_does_not_matter(seed: int, order: list[int]) -> None:
    inverse, targets = invert_covariance(make_covariance(seed)), randn(3, WIDTH, seed=seed)
    encoding, weight, outputs = randn(1, TOKENS, WIDTH, seed=1), randn(INNER, WIDTH, seed=2), randn(3, INNER, seed=3)
    shuffled = edit_layer(encoding, targets[order], inverse, weight, outputs[order])
    torch.testing.assert_close(shuffled, edit_layer(encoding, targets, inverse, weight, outputs), rtol=1e-3, atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(score=st.floats(-2, 3), bias=st.floats(0, 1), temperature=st.floats(0.05, 1))
def test_the_gate_is_one_half_at_the_bias_and_increases(score: float, bias: float, temperature: float) -> None:
    beta, tau = torch.tensor([bias]), torch.tensor([temperature])
    at = gate(torch.tensor([[[score]]]), beta, tau).item()
    assert at == pytest.approx(1 / (1 + np.exp(-(score - bias) / temperature)), abs=1e-5)
    assert gate(beta, beta, tau).item() == pytest.approx(0.5)
    assert gate(torch.tensor([score + 0.1]), beta, tau).item() >= at


# Gradients and precision


def test_gradients_with_respect_to_encoding_and_target_outputs(inverse: Tensor) -> None:
    targets = randn(2, WIDTH, seed=4, dtype=torch.float64)
    weight = randn(INNER, WIDTH, seed=2, dtype=torch.float64)

    def layer_output(encoding: Tensor, outputs: Tensor) -> Tensor:
        return edit_layer(encoding, targets, inverse.double(), weight, outputs)

    encoding = randn(1, 3, WIDTH, seed=1, dtype=torch.float64).requires_grad_()
    outputs = randn(2, INNER, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer_output, (encoding, outputs))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_encodings_are_compared_in_float32(inverse: Tensor, half: torch.dtype) -> None:
    encoding, targets = randn(BATCH, TOKENS, WIDTH, seed=1).to(half), randn(2, WIDTH, seed=4)
    scores = scores_of(encoding, targets, inverse)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, scores_of(encoding.float(), targets, inverse))
    projected = project_out(encoding, basis_of(targets, inverse))
    assert projected.dtype == half


def test_autocast_does_not_reach_the_inner_products(inverse: Tensor) -> None:
    encoding, targets = randn(BATCH, TOKENS, WIDTH, seed=1), randn(2, WIDTH, seed=4)
    expected = scores_of(encoding, targets, inverse), *basis_of(targets, inverse)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores_of(encoding, targets, inverse), *basis_of(targets, inverse)
        projected = project_out(encoding, basis_of(targets, inverse))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(projected, project_out(encoding, basis_of(targets, inverse)))
