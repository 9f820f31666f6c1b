"""The gated rank-one edit of Perfusion, equation by equation, as pure functions of tensors.

Source: Tewel, Gal, Chechik, Atzmon, "Key-Locked Rank One Editing for Text-to-Image Personalization", SIGGRAPH 2023
(arXiv 2305.01644), Eq. 3 and the appendix on several concepts. The rank-one edit itself is from Meng et al., "Locating
and Editing Factual Associations in GPT" (ROME, arXiv 2202.05262).

The edit changes what one cross-attention layer computes from a token: keys and values, h = W e. It removes the part of
the encoding that points to the concept, and adds the concept's target output as far as a gate is open. The gate opens
for tokens that are similar to the concept's input direction.

Legend (d: width of the text encoding, p: inner width of one cross-attention layer, J: number of concepts, 0 allowed):

    symbol     name in code          shape      meaning
    e          encoding              (B, N, d)  text encoder's output, one vector for each of N tokens
    W          weight                (p, d)     frozen projection of a layer, to_k.weight or to_v.weight
    C          covariance            (d, d)     uncentered covariance E[e e^T] of encodings over a caption corpus
    C^-1       inverse_covariance    (d, d)     what `invert_covariance` returns for it
    i*_j       target_inputs         (J, d)     input directions of the concepts
    C^-1 i*_j  duals                 (J, d)     their dual vectors: all that the edit needs of C
    o*_j       target_outputs        (J, p)     what the layer outputs for each concept
    beta, tau  bias, temperature     (J,)       threshold and softness of each concept's gate
    s_j(e)     similarity            (B, N, J)  <i*_j, e> / ||i*_j||^2 = dual_j . e / (dual_j . i*_j)
    g_j(e)     gates                 (B, N, J)  sigmoid((s_j(e) - beta_j) / tau_j)
    u_k        basis.vectors         (r, d)     basis of span{i*_1 ... i*_J}, orthonormal in <.,.>; r <= J
    C^-1 u_k   basis.duals           (r, d)     its dual vectors
    e_perp     projected             (B, N, d)  e - sum_k u_k <u_k, e>

    <a, b> = a^T C^-1 b,    ||i*||^2 = <i*, i*>,    h = W e_perp + sum_j g_j(e) o*_j

Every inner product above has an i* on one side. So C is needed only to compute the duals, once per concept. They are
stored in the concept's file, and generation never reads C. In matrices, with the rows of I and D being i*_j and dual_j:

    e_perp = e - I^T G^+ D e,    G = D I^T    (J, J), G^+ its pseudo-inverse

This is the paper's projection, here called "full". There is a second one of our own, called "gated":

    h = W (e + max_j g_j(e) (e_perp - e)) + sum_j g_j(e) o*_j

It equals the full projection where a gate is open, and leaves a token alone as far as the gate is closed. The reason:
take a token with half of a concept in it, as in "a red <my-teddy>", which is less similar to i* than "a <my-teddy>".
Under Eq. 3 it loses its super-category component and gets almost no concept in return. The subject disappears, and a
higher bias leads to no subject at all rather than to an ordinary teddy.

Our readings where the paper leaves something open:

* Ridge. We invert C + ridge * mean(diag C) * I. No eigenvalue of C exceeds its trace, so the condition number stays
  below d / ridge. For the default 1e-4 and d = 768 this is 8e6, the most that float32 can still represent. The scale
  of C cancels in s, so only a ridge relative to the mean diagonal has a meaning.
* Nearly parallel i*_j (two teddies). A QR decomposition would turn rounding noise into a basis vector. We therefore
  take the basis from the singular value decomposition of the Gram matrix of the unit i*_j, and drop singular values
  below `RANK_TOLERANCE` times the largest. With 1e-6, two unit vectors that differ by about a thousandth are one
  direction. A concept file in 16 bits keeps no smaller difference.
* Concepts under different C (trained with other captions, or another ridge). Each keeps the inner product it was
  trained with. G is then not symmetric, and e_perp still has similarity 0 to every concept.
* Training and inference use the same rule. i* is a constant in it: a moving average, not a parameter.
* Precision. C^-1 is ill-conditioned, so half precision and TF32 would ruin s. Duals are computed in float64 and kept in
  float32. Their inner products with encodings are sums in the dtype of the arguments, but at least float32. Neither
  autocast nor TF32 affects such sums, and they are cheap (one inner product per token and concept). Similarities and
  gates keep that dtype; `project_out` returns the dtype of the encoding it was given.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ldm.modules.isolated_sum import IsolatedSum

PROJECTIONS = ("full", "gated")
RIDGE = 1e-4
RANK_TOLERANCE = 1e-6
CHUNK = 16  # concepts whose products are in memory at a time: those of a thousand would take gigabytes


def invert_covariance(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return C^-1, symmetric, computed in float64 and stored in float32.

    Args:
        covariance: C, (d, d), uncentered covariance of token encodings; its scale does not matter.
        ridge: added to the diagonal before inverting, relative to the mean diagonal; at least 0.

    Returns:
        (d, d) float32, on the device of `covariance`.

    Raises:
        ValueError: the matrix is not square, not finite, or not positive definite (not a covariance).
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance must be a square matrix, not of shape {tuple(covariance.shape)}")
    exact = covariance.detach().to("cpu").double()  # to the CPU first: not every device supports float64
    if not exact.isfinite().all():
        raise ValueError("covariance holds numbers that are not finite")

    # C + ridge * mean(diag C) * I
    identity = torch.eye(len(exact), dtype=exact.dtype)
    ridged = (exact + exact.mT) / 2 + ridge * exact.diagonal().mean() * identity
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if failed:
        raise ValueError(f"covariance with a ridge of {ridge:g} times its mean diagonal is not positive definite")
    inverse = torch.cholesky_inverse(factor)
    return ((inverse + inverse.mT) / 2).float().to(covariance.device)


def dual_vectors(vectors: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return C^-1 a_j, so that <a_j, e> is the plain inner product of the dual of a_j with e.

    Args:
        vectors: a, (J, d), such as i*.
        inverse_covariance: C^-1, (d, d).

    Returns:
        (J, d), at least float32.
    """
    dtype = reduce(torch.promote_types, (vectors.dtype, inverse_covariance.dtype), torch.float32)
    exact = torch.float32 if vectors.device.type == "mps" else torch.float64  # MPS has no float64, and no TF32 either
    with torch.autocast(vectors.device.type, enabled=False):
        return (vectors.to(exact) @ inverse_covariance.to(exact)).to(dtype)


def energy(target_inputs: Tensor, duals: Tensor) -> Tensor:
    """Return ||i*_j||^2 = dual_j . i*_j.

    Args:
        target_inputs: i*, (J, d).
        duals: C^-1 i*, (J, d).

    Returns:
        (J,), at least float32.

    Raises:
        ValueError: the shapes differ; or (on the CPU only) an energy is not above 0, because i* is zero or not finite,
            or because the dual belongs to something else.
    """
    if duals.shape != target_inputs.shape:
        raise ValueError(f"duals must have the shape of target_inputs, {tuple(target_inputs.shape)}, not "
                         f"{tuple(duals.shape)}")
    energies = (target_inputs.to(duals.dtype) * duals).sum(-1)
    if has_nonpositive(energies):
        raise ValueError(f"the energy of every target input must be above 0, not {energies.tolist()}")
    return energies


def has_nonpositive(values: Tensor) -> bool:
    """Return whether a value is not above 0 (or NaN), as far as the CPU can tell; always False on other devices.

    Reading values from another device would make every training step wait until all its work is done.
    """
    return values.device.type == "cpu" and not bool((values > 0).all())


def similarity(encoding: Tensor, target_inputs: Tensor, duals: Tensor) -> Tensor:
    """Return s_j(e) = <i*_j, e> / ||i*_j||^2, which is 1 at e = i*_j.

    Args:
        encoding: e, (B, N, d).
        target_inputs: i*, (J, d).
        duals: C^-1 i*, (J, d).

    Returns:
        (B, N, J), at least float32.

    Raises:
        ValueError: as `energy`.
    """
    return _inner_products(encoding, duals) / energy(target_inputs, duals)


def gate(similarity: Tensor, bias: Tensor, temperature: Tensor) -> Tensor:
    """Return g_j = sigmoid((s_j - beta_j) / tau_j), in (0, 1).

    Args:
        similarity: s, (B, N, J).
        bias: beta, (J,).
        temperature: tau, (J,), above 0.

    Returns:
        (B, N, J).
    """
    return torch.sigmoid((similarity - bias) / temperature)


class Basis(NamedTuple):
    """A basis of the span of target inputs, orthonormal in <., .>: dual_k . u_l is 1 for k = l, else 0.

    Attributes:
        vectors: u, (r, d), where r <= J is the rank of the span.
        duals: C^-1 u, (r, d).
    """

    vectors: Tensor
    duals: Tensor


def concept_basis(target_inputs: Tensor, duals: Tensor) -> Basis:
    """Return u_k, a basis of span{i*_1 ... i*_J} that is orthonormal in <., .>, with its duals.

    For one concept it is i* / ||i*||, so `project_out` gives Eq. 3. For several, let the rows of I and D be the i*_j
    and their duals, both divided by ||i*_j||, and A S B^T = D I^T the singular value decomposition of their Gram
    matrix. Then U = S^-1/2 B^T I, with the duals S^-1/2 A^T D. If all duals are of one C, A equals B. It is computed in
    float64, without the directions that are only rounding noise (see `RANK_TOLERANCE`).

    Args:
        target_inputs: i*, (J, d), constants: no gradient flows through the basis of several.
        duals: C^-1 i*, (J, d).
    """
    # One concept: u = i* / ||i*||.
    norms = energy(target_inputs, duals).sqrt()[:, None]
    units = Basis(target_inputs / norms, duals / norms)
    if len(target_inputs) < 2:
        return units

    # Several: the Gram matrix A S B^T = D I^T, without small singular values.
    unit_inputs, unit_duals = (rows.detach().to("cpu").double() for rows in units)
    left, values, right = torch.linalg.svd(unit_duals @ unit_inputs.mT)
    significant = values > RANK_TOLERANCE * values[0]

    # U = S^-1/2 B^T I and its duals S^-1/2 A^T D
    scale = values[significant].rsqrt()[:, None]
    found = scale * right[significant] @ unit_inputs, scale * left.mT[significant] @ unit_duals
    return Basis(*(rows.to(norms.dtype).to(norms.device) for rows in found))


def project_out(encoding: Tensor, basis: Basis) -> Tensor:
    """Return e_perp = e - sum_k u_k <u_k, e>, the part of the encoding that no concept reads.

    Args:
        encoding: e, (B, N, d).
        basis: from `concept_basis`.

    Returns:
        (B, N, d), in the dtype of `encoding`.
    """
    coefficients = _inner_products(encoding, basis.duals)  # <u_k, e>
    chunks = zip(coefficients.split(CHUNK, -1), basis.vectors.split(CHUNK), strict=True)
    removed = sum((some[..., None] * rows).sum(-2) for some, rows in chunks)
    return (encoding - removed).to(encoding.dtype)


def gated_projection(encoding: Tensor, target_inputs: Tensor, duals: Tensor, gates: Tensor,
                     projections: Sequence[str]) -> Tensor:
    """Return what a layer's W is applied to: e_perp for full projections, e + max_j g_j (e_perp - e) for gated ones.

    Args:
        encoding: e, (B, N, d).
        target_inputs: i*, (J, d), J at least 1.
        duals: C^-1 i*, (J, d).
        gates: g, (B, N, J).
        projections: J of `PROJECTIONS`; if one is full, all concepts that act together use the full projection.

    Returns:
        (B, N, d), in the dtype of `encoding`.
    """
    projected = project_out(encoding, concept_basis(target_inputs, duals))
    if "full" in projections:
        return projected
    widest_gate = gates.amax(-1, keepdim=True).to(encoding.dtype)  # max_j g_j
    return encoding.lerp(projected, widest_gate)


def apply_edit(projected: Tensor, gates: Tensor, weight: Tensor, target_outputs: Tensor) -> Tensor:
    """Return h = W e_perp + sum_j g_j o*_j for one layer (Eq. 3); without concepts exactly W e.

    Args:
        projected: e_perp, (B, N, d), in the dtype of `weight` unless autocast is on.
        gates: g, (B, N, J).
        weight: W, (p, d).
        target_outputs: o*, (J, p), of any floating dtype.

    Returns:
        (B, N, p), in the dtype that the layer computes in.
    """
    # W e_perp: what the layer outputs without the concepts
    plain = functional.linear(projected, weight)
    # + sum_j g_j o*_j: the concepts, as far as their gates are open
    return plain + _gated_sum(gates.to(plain.dtype), target_outputs.to(plain.dtype))


def _gated_sum(gates: Tensor, target_outputs: Tensor) -> Tensor:
    """Return sum_j g_j o*_j, (B, N, p)."""
    if len(target_outputs) > 1 and target_outputs.requires_grad:
        return IsolatedSum.apply(gates, target_outputs)  # several concepts in training
    return gates @ target_outputs


def _inner_products(encoding: Tensor, duals: Tensor) -> Tensor:
    """Return dual_j . e of each encoding: (..., d), (J, d) -> (..., J), as sums (see Precision above)."""
    left = encoding.to(torch.promote_types(encoding.dtype, duals.dtype))[..., None, :]
    return torch.cat([(left * rows).sum(-1) for rows in duals.split(CHUNK)], -1)
