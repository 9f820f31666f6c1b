"""Prompts with concepts of Textual Inversion, Custom Diffusion and DreamBooth: their words, and weights they bring."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.concept import check_base
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.prompt_encoder import TextEncoder, check_distinct, check_width
from ldm.modules.context import PromptContext

SMALLEST = 1e-4  # eigenvalue, relative to the largest, up to which words of two concepts count as the same word


class FinetunedPromptEncoder:
    """Encodes prompts with the words of such concepts, for a U-Net that their weights stand in.

    The U-Net itself stays as it is: the weights go with the encoded prompts.

    Args:
        encoder: the base model's text encoder.
        unet: the base model's U-Net.
        concepts: one or more of one method, with different placeholders.
        base: fingerprint of the base model.
        inverse_covariance: what gives C^-1 of the text encoder, (d, d); called only to merge weights.

    Raises:
        UserError: a concept belongs to another base model, or two have the same placeholder.
    """

    def __init__(self, encoder: TextEncoder, unet: nn.Module, concepts: Sequence[FinetunedConcept], base: str,
                 inverse_covariance: Callable[[], Tensor]) -> None:
        self.encoder, self.concepts = encoder, list(concepts)
        self.placeholders = [concept.placeholder for concept in self.concepts]
        check_distinct(self.placeholders)
        own = dict(unet.named_parameters())
        for concept in self.concepts:
            check_base(concept, base)
            check_width(concept.label, concept.vectors, encoder.token_table)
            _check_weights(concept, own)
        weights = self.concepts[0].weights
        if weights and len(self.concepts) > 1:
            weights = merged_weights(own, self.concepts, inverse_covariance())
        self.weights = {name: _like(weight, own[name]) for name, weight in weights.items()}

    def subset_for(self, texts: Sequence[str]) -> FinetunedPromptEncoder:
        """Itself: beside words, these concepts have weights, which act whatever the texts name."""
        return self

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(B, N) numbers of word pieces, those of placeholders past the vocabulary's; raises as `encode` does."""
        return self.encoder.tokenize(prompts, self.placeholders, [len(concept.vectors) for concept in self.concepts])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], global_locking: bool = False) -> PromptContext:
        """What the U-Net needs of the prompts, for use at every timestep.

        Raises:
            UserError: a prompt is too long, or keys are to be locked, which these methods do not do.
        """
        if global_locking:
            raise UserError(f"--global_locking: concept {self.concepts[0].label} was learned "
                            f"{self.concepts[0].summary}, which locks no keys; leave the flag out")
        vectors = torch.cat([concept.vectors for concept in self.concepts]).to(self.encoder.token_table.device)
        encoding = self.encoder.encode_tokens(self.tokens(prompts), vectors)
        return PromptContext.plain(encoding, cache=True, weights=self.weights)

    def mask_concepts(self, context: PromptContext, texts: Sequence[str]) -> PromptContext:
        """What `encode` gave: beside words, these concepts have only weights, which act on every prompt."""
        return context


def _check_weights(concept: FinetunedConcept, own: Mapping[str, Tensor]) -> None:
    odd = [name for name, weight in concept.weights.items() if name not in own or own[name].shape != weight.shape]
    if odd:
        raise UserError(f"concept {concept.label} does not fit this model: they differ in {odd[0]}; train it again")


def _like(weight: Tensor, own: Tensor) -> Tensor:
    """`weight` where and as the U-Net keeps its own; convolutions in the memory format that models here have."""
    weight = weight.to(own)
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


@torch.no_grad()
def merged_weights(base: Mapping[str, Tensor], concepts: Sequence[FinetunedConcept], inverse_covariance: Tensor
                   ) -> dict[str, Tensor]:
    """Weights of Custom Diffusion concepts that were learned apart (Kumari et al. 2023, Sec. 3.2).

    Of all W that map the encodings c_j of each concept's word to what that concept's own weights W_j make of them, the
    one that changes what is made of other encodings, whose covariance is C, the least, in closed form:

        W = W_0 + (V - W_0 E^T) (E C^-1 E^T)^+ E C^-1    with E the rows c_j, and V the columns W_j c_j

    The pseudo-inverse gives encodings that are nearly the same, of two teddy bears say, the mean of what they ask for,
    where the inverse would give W without bounds.

    Args:
        base: name -> W_0, (p, d).
        concepts: two or more, whose `inputs` are the c_j: one row for each token of the word.
        inverse_covariance: C^-1, (d, d); its scale cancels.

    Raises:
        UserError: a concept whose file has no `inputs`.
    """
    lacking = [concept.label for concept in concepts if not len(concept.inputs)]
    if lacking:
        raise UserError(f"concept {lacking[0]}: its file lacks what merging needs; use it alone, or train it again")
    targets = torch.cat([concept.inputs for concept in concepts]).cpu().double()  # E
    dual = targets @ inverse_covariance.cpu().double()
    gram = dual @ targets.mT
    push = torch.linalg.pinv(gram, rtol=SMALLEST, hermitian=True) @ dual
    merged = {}
    for name in concepts[0].weights:
        start = base[name].cpu().double()
        wanted = [concept.weights[name].cpu().double() @ concept.inputs.cpu().double().mT for concept in concepts]
        merged[name] = (start + (torch.cat(wanted, 1) - start @ targets.mT) @ push).float()
    return merged
