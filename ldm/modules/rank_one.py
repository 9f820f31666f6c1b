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
    o*_j       target_outputs        (J, p)     what the layer outputs for each concept
    beta, tau  bias, temperature     (J,)       threshold and softness of each concept's gate
    s_j(e)     similarity            (B, N, J)  <i*_j, e> / ||i*_j||^2
    g_j(e)     gates                 (B, N, J)  sigmoid((s_j(e) - beta_j) / tau_j)
    u_k        basis                 (r, d)     basis of span{i*_1 ... i*_J}, orthonormal in <.,.>; r <= J
    e_perp     projected             (B, N, d)  e - sum_k u_k <u_k, e>

    <a, b> = a^T C^-1 b,    ||i*||^2 = <i*, i*>,    h = W e_perp + sum_j g_j(e) o*_j

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
  take the basis from the eigendecomposition of the Gram matrix of the unit i*_j, and drop eigenvalues below
  `RANK_TOLERANCE` times the largest. With 1e-6, two unit vectors that differ by about a thousandth are one direction.
  A concept file in 16 bits keeps no smaller difference.
* Training and inference use the same rule. i* is a constant in it: a moving average, not a parameter.
* Precision. C^-1 is ill-conditioned, so half precision and TF32 would ruin s. C^-1 a is computed in float64. Its inner
  products with encodings are sums in the dtype of the arguments, but at least float32. Neither autocast nor TF32
  affects such sums, and they are cheap (one inner product per token and concept). Similarities and gates keep that
  dtype; `project_out` returns the dtype of the encoding it was given.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

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


def energy(target_inputs: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return ||i*_j||^2 = <i*_j, i*_j>.

    Args:
        target_inputs: i*, (J, d).
        inverse_covariance: C^-1, (d, d).

    Returns:
        (J,), at least float32.

    Raises:
        ValueError: (on the CPU only) an energy is not above 0, because i* is zero or not finite, or because C^-1 is not
            positive definite.
    """
    return _energies(target_inputs, _dual(target_inputs, inverse_covariance))


def has_nonpositive(values: Tensor) -> bool:
    """Return whether a value is not above 0 (or NaN), as far as the CPU can tell; always False on other devices.

    Reading values from another device would make every training step wait until all its work is done.
    """
    return values.device.type == "cpu" and not bool((values > 0).all())


def _energies(target_inputs: Tensor, dual: Tensor) -> Tensor:
    energies = (target_inputs.to(dual.dtype) * dual).sum(-1)
    if has_nonpositive(energies):
        raise ValueError(f"the energy of every target input must be above 0, not {energies.tolist()}")
    return energies


def similarity(encoding: Tensor, target_inputs: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return s_j(e) = <i*_j, e> / ||i*_j||^2, which is 1 at e = i*_j.

    Args:
        encoding: e, (B, N, d).
        target_inputs: i*, (J, d).
        inverse_covariance: C^-1, (d, d).

    Returns:
        (B, N, J), at least float32.

    Raises:
        ValueError: as `energy`.
    """
    dual = _dual(target_inputs, inverse_covariance)
    return _inner_products(encoding, dual) / _energies(target_inputs, dual)


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


def concept_basis(target_inputs: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return u_k, a basis of span{i*_1 ... i*_J} that is orthonormal in <., .>.

    For one concept it is i* / ||i*||, so `project_out` gives Eq. 3. For several it is U = Lambda^-1/2 V^T I, where the
    rows of I are the unit i*_j and V Lambda V^T = I C^-1 I^T. It is computed in float64, without the directions that
    are only rounding noise (see `RANK_TOLERANCE`).

    Args:
        target_inputs: i*, (J, d), constants: no gradient flows through the basis of several.
        inverse_covariance: C^-1, (d, d).

    Returns:
        (r, d), where r <= J is the rank of the span.
    """
    # One concept: u = i* / ||i*||.
    norms = energy(target_inputs, inverse_covariance).sqrt()
    units = target_inputs / norms[:, None]
    if len(units) < 2:
        return units

    # Several: the Gram matrix I C^-1 I^T = V Lambda V^T, without small eigenvalues.
    exact = units.detach().to("cpu").double()
    gram = exact @ inverse_covariance.detach().to("cpu").double() @ exact.mT
    values, vectors = torch.linalg.eigh(gram)
    significant = values > RANK_TOLERANCE * values[-1]

    # U = Lambda^-1/2 V^T I
    basis = (vectors[:, significant] / values[significant].sqrt()).mT @ exact
    return basis.to(units.dtype).to(units.device)


def project_out(encoding: Tensor, basis: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return e_perp = e - sum_k u_k <u_k, e>, the part of the encoding that no concept reads.

    Args:
        encoding: e, (B, N, d).
        basis: u, (r, d), from `concept_basis`.
        inverse_covariance: C^-1, (d, d).

    Returns:
        (B, N, d), in the dtype of `encoding`.
    """
    coefficients = _inner_products(encoding, _dual(basis, inverse_covariance))  # <u_k, e>
    chunks = zip(coefficients.split(CHUNK, -1), basis.split(CHUNK), strict=True)
    removed = sum((some[..., None] * rows).sum(-2) for some, rows in chunks)
    return (encoding - removed).to(encoding.dtype)


def gated_projection(encoding: Tensor, target_inputs: Tensor, inverse_covariance: Tensor, gates: Tensor,
                     projections: Sequence[str]) -> Tensor:
    """Return what a layer's W is applied to: e_perp for full projections, e + max_j g_j (e_perp - e) for gated ones.

    Args:
        encoding: e, (B, N, d).
        target_inputs: i*, (J, d), J at least 1.
        inverse_covariance: C^-1, (d, d).
        gates: g, (B, N, J).
        projections: J of `PROJECTIONS`; if one is full, all concepts that act together use the full projection.

    Returns:
        (B, N, d), in the dtype of `encoding`.
    """
    projected = project_out(encoding, concept_basis(target_inputs, inverse_covariance), inverse_covariance)
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


def _dual(vectors: Tensor, inverse_covariance: Tensor) -> Tensor:
    """Return C^-1 a_j, so that <e, a_j> is a plain inner product: (J, d), (d, d) -> (J, d), at least float32."""
    dtype = reduce(torch.promote_types, (vectors.dtype, inverse_covariance.dtype), torch.float32)
    exact = torch.float32 if vectors.device.type == "mps" else torch.float64  # MPS has no float64, and no TF32 either
    with torch.autocast(vectors.device.type, enabled=False):
        return (vectors.to(exact) @ inverse_covariance.to(exact)).to(dtype)


def _inner_products(encoding: Tensor, dual: Tensor) -> Tensor:
    """Return each encoding times each row: (..., d), (J, d) -> (..., J), as sums (see Precision above)."""
    left = encoding.to(torch.promote_types(encoding.dtype, dual.dtype))[..., None, :]
    return torch.cat([(left * rows).sum(-1) for rows in dual.split(CHUNK)], -1)
