"""Encode prompts that contain concepts of methods other than Perfusion: word vectors, and weights for the U-Net."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.fingerprint import BaseModel, check_base
from ldm.concepts.placeholders import check_distinct
from ldm.concepts.prompt_checks import check_width
from ldm.concepts.prompt_weights import Prompt, texts_of, token_weights
from ldm.concepts.weight_merging import merge_weights
from ldm.modules.context import PromptContext
from ldm.modules.encoders.prompts import PromptEncoder


class FinetunedPromptEncoder:
    """Encodes prompts with the words of such concepts, and adds the weights that replace those of the U-Net.

    The U-Net itself is not modified: the weights travel with the encoded prompts (`PromptContext.weights`).

    Args:
        encoder: the text encoder of the base model.
        unet: the U-Net of the base model.
        concepts: one or more of one method, with different placeholders, and words.
        base: the base model.
        inverse_covariance: returns C^-1 of the text encoder, (d, d); called only to merge weights.

    Attributes:
        placeholders: those of the concepts, in their order.
        weights: name in the U-Net -> weight that replaces it.

    Raises:
        UserError: a concept belongs to another base model, two have the same placeholder, or their weights cannot be
            merged.
    """

    def __init__(self, encoder: PromptEncoder, unet: nn.Module, concepts: Sequence[FinetunedConcept],
                 base: BaseModel, inverse_covariance: Callable[[], Tensor]) -> None:
        self.encoder = encoder
        self.concepts = list(concepts)
        self.placeholders = [concept.placeholder for concept in self.concepts]
        check_distinct(self.placeholders)
        unet_weights = dict(unet.named_parameters())
        for concept in self.concepts:
            check_width(concept.label, concept.vectors, encoder.embedding_width)
            check_base(concept, base)
            _check_weights(concept, unet_weights)
            _check_loras(concept, unet)
        with_weights = [concept for concept in self.concepts if not concept.is_word]
        weights = with_weights[0].weights if with_weights else {}
        if len(with_weights) > 1:
            weights = merge_weights(unet_weights, with_weights, inverse_covariance())
        self.weights = {name: _like(weight, unet_weights[name]) for name, weight in weights.items()}

    def subset_for(self, texts: Sequence[str]) -> FinetunedPromptEncoder:
        """Return self: the weights of these concepts act on every prompt, whatever the texts contain."""
        return self

    def tokens(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the token ids of the prompts, (B, N); those of placeholders are past the vocabulary.

        Raises:
            UserError: a prompt is too long.
        """
        return self.encoder.tokenize(texts_of(prompts), self.placeholders, self._vector_counts)

    def token_weights(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Return the weights of the prompts' tokens, (B, N); None if all are 1."""
        return token_weights(self.encoder, prompts, self.placeholders, self._vector_counts)

    @property
    def _vector_counts(self) -> list[int]:
        """The number of tokens of each placeholder."""
        return [len(concept.vectors) for concept in self.concepts]

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], global_locking: bool = False) -> PromptContext:
        """Encode prompts for use at every timestep: keys and values are cached in the result.

        Their weights change nothing here, see `PromptContext.scale_tokens`.

        Raises:
            UserError: a prompt is too long, or `global_locking` is set, which only Perfusion has.
        """
        if global_locking:
            raise UserError(f"--global_locking: concept {self.concepts[0].label} was learned "
                            f"{self.concepts[0].summary}, which locks no keys; leave the flag out")
        vectors = torch.cat([concept.vectors for concept in self.concepts]).to(self.encoder.device)
        encoding, pooled = self.encoder.encode_with_pooled(self.tokens(prompts), vectors)
        return PromptContext.plain(encoding, cache=True, weights=self.weights, pooled=pooled)

    @torch.no_grad()
    def encode_unconditional(self, global_locking: bool = False) -> PromptContext:
        """Encode the empty negative prompt; see `PromptEncoder.encode_unconditional`."""
        encoding, pooled = self.encoder.encode_unconditional()
        return PromptContext.plain(encoding, cache=True, weights=self.weights, pooled=pooled)

    def mask_concepts(self, context: PromptContext, texts: Sequence[str]) -> PromptContext:
        """Return the context unchanged: the weights of these concepts act on every prompt."""
        return context


def _check_weights(concept: FinetunedConcept, unet_weights: Mapping[str, Tensor]) -> None:
    """Raise UserError if the concept replaces a weight that the U-Net does not have in that shape."""
    for name, weight in concept.weights.items():
        if name not in unet_weights or unet_weights[name].shape != weight.shape:
            raise UserError(f"concept {concept.label} does not fit this model: they differ in {name}; train it again")


def _check_loras(concept: FinetunedConcept, unet: nn.Module) -> None:
    """Raise UserError if the concept replaces weights that a LoRA has changed."""
    if concept.weights.keys() & getattr(unet, "lora_weights", frozenset()):
        raise UserError(f"concept {concept.label} was learned {concept.summary}, which replaces weights that a LoRA "
                        "has changed, so the two cannot be used together; leave one of them out")


def _like(weight: Tensor, original: Tensor) -> Tensor:
    """Return `weight` with the device and dtype of the original; convolutions in channels-last memory format."""
    weight = weight.to(original)
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
