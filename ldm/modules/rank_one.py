"""The gated rank-one edit of Perfusion, equation by equation, as pure functions of tensors.

Source: Tewel, Gal, Chechik, Atzmon, "Key-Locked Rank One Editing for Text-to-Image Personalization", SIGGRAPH 2023
(arXiv 2305.01644), Eq. 3 and its appendix on several concepts; the rank-one edit itself is that of Meng et al.,
"Locating and Editing Factual Associations in GPT" (ROME, arXiv 2202.05262).

Legend (d: width of the text encoding, p: inner width of one cross-attention layer, J: number of concepts, 0 allowed):

    symbol     name in code          shape      meaning
    e          encoding              (B, N, d)  text encoder's output, one vector for each of N tokens
    W          weight                (p, d)     frozen projection of a layer, to_k.weight or to_v.weight
    C          covariance            (d, d)     uncentered covariance E[e e^T] of encodings over a caption corpus
    C^-1       inverse_covariance    (d, d)     what `invert_covariance` makes of it
    i*_j       target_inputs         (J, d)     input directions of the concepts
    o*_j       target_outputs        (J, p)     what the layer gives to each concept
    beta, tau  bias, temperature     (J,)       threshold and softness of each concept's gate
    s_j(e)     similarity            (B, N, J)  <i*_j, e> / ||i*_j||^2
    g_j(e)     gates                 (B, N, J)  sigmoid((s_j(e) - beta_j) / tau_j)
    u_k        basis                 (r, d)     basis of span{i*_1 ... i*_J}, orthonormal in <.,.>; r <= J
    e_perp     projected             (B, N, d)  e - sum_k u_k <u_k, e>

    <a, b> = a^T C^-1 b,    ||i*||^2 = <i*, i*>,    h = W e_perp + sum_j g_j(e) o*_j

Beside the paper's "full" projection, which is this, there is a "gated" one of our own:

    h = W (e + max_j g_j(e) (e_perp - e)) + sum_j g_j(e) o*_j

It is the same where a gate is open, and leaves a token alone to the degree that it is shut. By Eq. 3 a token with half
of a concept in it ("a red <my-teddy>" is less like i* than "a <my-teddy>") loses its teddy and is given hardly anything
instead: the kind of thing disappears, and a higher bias leads to nothing rather than to an ordinary teddy.

Our readings, where the paper leaves something open:

* Ridge. C + ridge * mean(diag C) * I is inverted. As no eigenvalue of C exceeds its trace, the condition number stays
  below d / ridge, which for the default 1e-4 and d = 768 is 8e6: the most that float32 can still represent. The scale
  of C cancels in s, so a ridge relative to the mean diagonal is the only one with a meaning.
* Nearly parallel i*_j (two teddies). A QR decomposition would make a basis vector out of rounding noise, so the basis
  comes from the eigendecomposition of the Gram matrix of the unit i*_j; eigenvalues below `RANK_TOLERANCE` times the
  largest are dropped. 1e-6 means: two unit vectors that differ by about a thousandth are one direction, which is
  what is left of such a difference in a concept file of 16-bit numbers.
* Training and inference use the same rule, and i* enters it as a constant: it is a moving average, not a parameter.
* Precision. C^-1 is ill-conditioned, so half precision and TF32 would ruin s. C^-1 a is computed in float64, and its
  products with encodings as sums in the dtype of the arguments, but never in less than float32; neither autocast nor
  TF32 touches such sums, and they are small (one inner product per token and concept). Similarities and gates keep
  that dtype; `project_out` returns the dtype of the encoding it was given.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

PROJECTIONS = ("full", "gated")
RIDGE = 1e-4
RANK_TOLERANCE = 1e-6
ROWS = 16  # concepts whose products are held at a time: those of all of a thousand would take gigabytes


def invert_covariance(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """C^-1, symmetric, computed in float64 and kept in float32.

    Args:
        covariance: (d, d), uncentered covariance of token encodings; its scale does not matter.
        ridge: what is added to the diagonal before inverting, relative to the mean diagonal; at least 0.

    Returns:
        (d, d) float32, on the device of `covariance`.

    Raises:
        ValueError: not a square matrix, numbers that are not finite, or no covariance (not positive definite).
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance must be a square matrix, not of shape {tuple(covariance.shape)}")
    exact = covariance.detach().to("cpu").double()  # to the CPU first: not every device knows float64
    if not exact.isfinite().all():
        raise ValueError("covariance holds numbers that are not finite")
    raised = (exact + exact.mT) / 2 + ridge * exact.diagonal().mean() * torch.eye(len(exact), dtype=exact.dtype)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if failed:
        raise ValueError(f"covariance with a ridge of {ridge:g} times its mean diagonal is not positive definite")
    inverse = torch.cholesky_inverse(factor)
    return ((inverse + inverse.mT) / 2).float().to(covariance.device)


def energy(target_inputs: Tensor, inverse_covariance: Tensor) -> Tensor:
    """||i*_j||^2 = <i*_j, i*_j>: (J, d), (d, d) -> (J,).

    Raises:
        ValueError: on the CPU: an energy is not above 0: that i* is zero or not finite, or C^-1 is not positive
            definite.
    """
    return _energies(target_inputs, _dual(target_inputs, inverse_covariance))


def known_nonpositive(values: Tensor) -> bool:
    """Whether some of the values are known to be 0, less, or no numbers: they are looked at on the CPU only.

    To look at them on another device would be to wait, in every training step, until all its work is done.
    """
    return values.device.type == "cpu" and not bool((values > 0).all())


def _energies(target_inputs: Tensor, dual: Tensor) -> Tensor:
    energies = (target_inputs.to(dual.dtype) * dual).sum(-1)
    if known_nonpositive(energies):
        raise ValueError(f"the energy of every target input must be above 0, not {energies.tolist()}")
    return energies


def similarity(encoding: Tensor, target_inputs: Tensor, inverse_covariance: Tensor) -> Tensor:
    """s_j(e) = <i*_j, e> / ||i*_j||^2, which is 1 at e = i*_j: (B, N, d), (J, d), (d, d) -> (B, N, J)."""
    dual = _dual(target_inputs, inverse_covariance)
    return _products(encoding, dual) / _energies(target_inputs, dual)


def gate(similarity: Tensor, bias: Tensor, temperature: Tensor) -> Tensor:
    """sigmoid((s_j - beta_j) / tau_j), in (0, 1): (B, N, J), (J,), (J,) -> (B, N, J)."""
    return torch.sigmoid((similarity - bias) / temperature)


def concept_basis(target_inputs: Tensor, inverse_covariance: Tensor) -> Tensor:
    """u_k: a basis of span{i*_1 ... i*_J} that is orthonormal in <., .>.

    For one concept that is i* / ||i*||, so that `project_out` gives Eq. 3. For several, U = Lambda^-1/2 V^T I, where I
    holds the unit i*_j as rows and V Lambda V^T = I C^-1 I^T, computed in float64 and without the directions that
    stand for nothing but rounding (see `RANK_TOLERANCE`).

    Args:
        target_inputs: (J, d); constants, no gradient flows through the basis of several.
        inverse_covariance: (d, d).

    Returns:
        (r, d), r <= J the rank of the span.
    """
    norms = energy(target_inputs, inverse_covariance).sqrt()
    units = target_inputs / norms[:, None]
    if len(units) < 2:
        return units
    exact = units.detach().to("cpu").double()
    gram = exact @ inverse_covariance.detach().to("cpu").double() @ exact.mT
    values, vectors = torch.linalg.eigh(gram)
    kept = values > RANK_TOLERANCE * values[-1]
    basis = (vectors[:, kept] / values[kept].sqrt()).mT @ exact
    return basis.to(units.dtype).to(units.device)


def project_out(encoding: Tensor, basis: Tensor, inverse_covariance: Tensor) -> Tensor:
    """e_perp = e - sum_k u_k <u_k, e>, what the edit leaves alone: (B, N, d), (r, d), (d, d) -> (B, N, d)."""
    coefficients = _products(encoding, _dual(basis, inverse_covariance))
    parts = zip(coefficients.split(ROWS, -1), basis.split(ROWS), strict=True)
    removed = sum((some[..., None] * rows).sum(-2) for some, rows in parts)
    return (encoding - removed).to(encoding.dtype)


def gated_projection(encoding: Tensor, target_inputs: Tensor, inverse_covariance: Tensor, gates: Tensor,
                projections: Sequence[str]) -> Tensor:
    """What each token keeps: e_perp, or where projections are gated what lies as far from e to it as gates are open.

    Args:
        encoding: e, (B, N, d).
        target_inputs: i*, (J, d), J at least 1.
        inverse_covariance: C^-1, (d, d).
        gates: (B, N, J).
        projections: of `PROJECTIONS`, J; where one is full, so is that of all concepts that act together.

    Returns:
        (B, N, d).
    """
    projected = project_out(encoding, concept_basis(target_inputs, inverse_covariance), inverse_covariance)
    if "full" in projections:
        return projected
    return encoding.lerp(projected, gates.amax(-1, keepdim=True).to(encoding.dtype))


def apply_edit(projected: Tensor, gates: Tensor, weight: Tensor, target_outputs: Tensor) -> Tensor:
    """h = W e_perp + sum_j g_j o*_j for one layer; without concepts exactly W e.

    Args:
        projected: e_perp, (B, N, d), in the dtype of `weight` unless autocast is on.
        gates: (B, N, J).
        weight: W, (p, d).
        target_outputs: o*, (J, p), of any floating dtype.

    Returns:
        (B, N, p), in the dtype that the layer computes in.
    """
    plain = functional.linear(projected, weight)
    return plain + gates.to(plain.dtype) @ target_outputs.to(plain.dtype)


def _dual(vectors: Tensor, inverse_covariance: Tensor) -> Tensor:
    """C^-1 a_j, by which <e, a_j> is a plain product: (J, d), (d, d) -> (J, d), at least float32."""
    dtype = reduce(torch.promote_types, (vectors.dtype, inverse_covariance.dtype), torch.float32)
    exact = torch.float32 if vectors.device.type == "mps" else torch.float64  # that has no float64, and no TF32 either
    with torch.autocast(vectors.device.type, enabled=False):
        return (vectors.to(exact) @ inverse_covariance.to(exact)).to(dtype)


def _products(encoding: Tensor, dual: Tensor) -> Tensor:
    """Each encoding times each row: (..., d), (J, d) -> (..., J), as sums (see Precision above)."""
    left = encoding.to(torch.promote_types(encoding.dtype, dual.dtype))[..., None, :]
    return torch.cat([(left * rows).sum(-1) for rows in dual.split(ROWS)], -1)
