"""Merge weights of concepts that were trained separately, in closed form.

Source: Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion" (CVPR 2023, arXiv 2212.04488), Sec. 3.2.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept

# Eigenvalues of the Gram matrix below this share of the largest count as zero: two tokens that similar are one token.
RANK_TOLERANCE = 1e-4


def check_weights_merge(first: AnyConcept, other: AnyConcept) -> None:
    """Raise UserError if the two concepts replace weights of the U-Net that cannot be merged."""
    if not isinstance(first, FinetunedConcept) or not isinstance(other, FinetunedConcept):
        return
    if not (first.has_mergeable_weights and other.has_mergeable_weights):
        raise UserError(f"{first.label} and {other.label}: {first.method_label} changes weights of the U-Net that "
                        "cannot be merged, so two of its concepts cannot be used together; choose one")
    if first.weights.keys() != other.weights.keys():
        different = min(first.weights.keys() ^ other.weights.keys())
        raise UserError(f"{first.label} and {other.label}: only one of them changes {different}, so they cannot be "
                        "used together; choose one, or train both with the same settings")


@torch.no_grad()
def merge_weights(base: Mapping[str, Tensor], concepts: Sequence[FinetunedConcept], inverse_covariance: Tensor
                  ) -> dict[str, Tensor]:
    """Return the weights that make several concepts of Custom Diffusion usable together.

    Let c_j be the encodings of the concepts' tokens, and W_j the weights of the concept that c_j belongs to. Among all
    W with W c_j = W_j c_j for every j, take the one that changes the output for other encodings, with covariance C,
    the least. In closed form:

        W = W_0 + (V - W_0 E^T) (E C^-1 E^T)^+ E C^-1    with E the rows c_j, and V the columns W_j c_j

    The pseudo-inverse handles tokens with nearly the same encoding, such as those of two teddy bears: they get the mean
    of their outputs. A plain inverse would give unbounded weights.

    Args:
        base: name -> W_0, (p, d), the weights of the base model.
        concepts: two or more; row j of their `inputs` is c_j, one row per token of the placeholder.
        inverse_covariance: C^-1, (d, d); its scale cancels.

    Returns:
        name -> W, (p, d), float32 on the CPU.

    Raises:
        UserError: the weights cannot be merged (see `check_weights_merge`).
    """
    for other in concepts[1:]:
        check_weights_merge(concepts[0], other)

    # (E C^-1 E^T)^+ E C^-1, the same for all weights
    targets = torch.cat([concept.inputs for concept in concepts]).cpu().double()  # E
    dual = targets @ inverse_covariance.cpu().double()  # E C^-1
    gram = dual @ targets.mT
    update_directions = torch.linalg.pinv(gram, rtol=RANK_TOLERANCE, hermitian=True) @ dual

    merged = {}
    for name in concepts[0].weights:
        start = base[name].cpu().double()  # W_0
        outputs = [concept.weights[name].cpu().double() @ concept.inputs.cpu().double().mT for concept in concepts]
        difference = torch.cat(outputs, 1) - start @ targets.mT  # V - W_0 E^T
        merged[name] = (start + difference @ update_directions).float()
    return merged
