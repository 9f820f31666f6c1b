"""Encode prompts that contain Perfusion concepts, and words beside them, for a model that has never seen them."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm.concepts.concept import SUPER_CATEGORY, Concept
from ldm.concepts.duals import add_duals
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.fingerprint import BaseModel, check_base
from ldm.concepts.placeholders import check_distinct, find_placeholders
from ldm.concepts.prompt_checks import check_width, warn_covariance_mismatch
from ldm.concepts.prompt_weights import Prompt, texts_of, token_weights
from ldm.concepts.settings import override_settings
from ldm.concepts.stacking import check_layers, gate_settings, stack_concepts
from ldm.modules.context import PromptContext, TextLayer
from ldm.modules.edit import Edit
from ldm.modules.encoders.prompts import PromptEncoder, word_vector


class ConceptPromptEncoder:
    """Encodes prompts under the edit of Perfusion concepts.

    Args:
        encoder: the text encoder of the base model.
        text_layers: layer name -> cross-attention layer, from `ldm.modules.attention.name_text_layers`.
        concepts: any number of them, with different placeholders; without concepts, prompts are encoded as usual. Some
            may be words alone, such as embeddings of Textual Inversion: they act by their vectors, without an edit.
        inverse_covariance: C^-1 of the text encoder, (d, d), or a function that returns it, for concepts from older
            files that do not store their dual. The function is called only if there is one, and after the concepts have
            been checked, since it may take long.
        base: the base model; None: the one that the layers are of.

    Attributes:
        placeholders: those of the concepts, in their order.

    Raises:
        UserError: a concept belongs to another base model, or two have the same placeholder.
        ValueError: a concept has no dual, and there is no `inverse_covariance`.
    """

    def __init__(self, encoder: PromptEncoder, text_layers: dict[str, TextLayer], concepts: Sequence[AnyConcept],
                 inverse_covariance: Tensor | Callable[[], Tensor] | None = None, base: BaseModel | None = None
                 ) -> None:
        self.encoder = encoder
        self.text_layers = text_layers
        self.concepts = list(concepts)
        self.placeholders = [concept.placeholder for concept in self.concepts]
        self._last_subset: tuple[list[int], ConceptPromptEncoder] | None = None
        check_distinct(self.placeholders)
        if not self.concepts:
            return
        base = base or BaseModel.of(text_layers)
        for concept in self.concepts:
            check_base(concept, base)
            check_width(concept.label, concept.word_vectors, encoder.embedding_width)
            if not concept.is_word:
                check_layers(concept, text_layers)
        with_duals = iter(add_duals(self.edited, lambda: _given(inverse_covariance)))
        self.concepts = [concept if concept.is_word else next(with_duals) for concept in self.concepts]

    @property
    def edited(self) -> list[Concept]:
        """The concepts that edit keys and values: all but words."""
        return [concept for concept in self.concepts if not concept.is_word]

    @property
    def _counts(self) -> list[int] | None:
        """The number of tokens of each placeholder; None: one each."""
        return [len(concept.word_vectors) for concept in self.concepts] or None

    def subset_for(self, texts: Sequence[str]) -> ConceptPromptEncoder:
        """Return an encoder with only those concepts whose placeholders occur in at least one of the texts.

        Encoding takes longer the more concepts there are, so the others are left out. The last subset is cached:
        asking for the same concepts again moves nothing to the device.
        """
        indices = sorted(find_placeholders(texts, self.placeholders))
        if len(indices) == len(self.concepts):
            return self
        if self._last_subset is None or self._last_subset[0] != indices:
            subset = copy.copy(self)
            subset.__dict__.pop("_stacked_edit", None)  # the cached edit of all concepts
            subset.concepts = [self.concepts[index] for index in indices]
            subset.placeholders = [concept.placeholder for concept in subset.concepts]
            subset._last_subset = None
            self._last_subset = indices, subset
        return self._last_subset[1]

    def tokens(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the token ids of the prompts, (B, N); those of placeholders are past the vocabulary, in order.

        Raises:
            UserError: a prompt is too long.
        """
        return self.encoder.tokenize(texts_of(prompts), self.placeholders, self._counts)

    def token_weights(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Return the weights of the prompts' tokens, (B, N); None if all are 1."""
        return token_weights(self.encoder, prompts, self.placeholders, self._counts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], biases: Sequence[float] | None = None,
               temperatures: Sequence[float] | None = None, global_locking: bool = False) -> PromptContext:
        """Encode prompts for use at every timestep: keys and values are cached in the result.

        Args:
            prompts: B prompts, with or without placeholders. Their weights change nothing here, see
                `PromptContext.scale_tokens`.
            biases: beta, one for all concepts or one each; None: their own.
            temperatures: tau, likewise.
            global_locking: take the keys of the whole prompt from the same prompt with super-categories in place of
                the concepts. False: only the keys of concept tokens are locked (local locking).

        Raises:
            UserError: a prompt is too long, or the number of biases or temperatures is wrong.
        """
        tokens = self.tokens(prompts)
        if not self.concepts:
            encoding, pooled = self.encoder.encode_with_pooled(tokens)
            return PromptContext.plain(encoding, cache=True, pooled=pooled).to(self.device)

        # e: the encoding with the learned embedding v at each placeholder.
        learned = self._vectors(lambda _: False)
        if not self.edited:
            encoding, pooled = self.encoder.encode_with_pooled(tokens, learned)
            return PromptContext.plain(encoding, cache=True, pooled=pooled).to(self.device)
        encoding = self.encoder.encode_tokens(tokens, learned)

        # For global locking, the same tokens with the super-category's embedding at each placeholder.
        super_encoding = None
        if global_locking:
            super_encoding = self.encoder.encode_tokens(tokens, self._vectors(lambda _: True))

        # The pooled encoding reaches the U-Net outside of cross-attention, so each concept has its own choice there.
        pooled = None
        if self.encoder.has_pooled:
            vectors = self._vectors(lambda concept: concept.pooled == SUPER_CATEGORY)
            pooled = self.encoder.encode_with_pooled(tokens, vectors)[1]
        return self._edited(encoding, super_encoding, pooled, biases, temperatures)

    @torch.no_grad()
    def encode_unconditional(self, global_locking: bool = False) -> PromptContext:
        """Encode the empty negative prompt, under the same edit; see `PromptEncoder.encode_unconditional`."""
        encoding, pooled = self.encoder.encode_unconditional()
        if not self.edited:
            return PromptContext.plain(encoding, cache=True, pooled=pooled).to(self.device)
        return self._edited(encoding, encoding if global_locking else None, pooled)

    def _vectors(self, is_locked: Callable[[Concept], bool]) -> Tensor:
        """Return the vectors of all words, in order: the super-category's for concepts that are locked.

        Args:
            is_locked: called with each concept that is no word alone.
        """
        vectors = [concept.word_vectors if concept.is_word or not is_locked(concept)
                   else word_vector(self.encoder, concept.super_category) for concept in self.concepts]
        return torch.cat([vector.to(self.encoder.device) for vector in vectors])

    def _edited(self, encoding: Tensor, super_encoding: Tensor | None, pooled: Tensor | None,
                biases: Sequence[float] | None = None, temperatures: Sequence[float] | None = None) -> PromptContext:
        """Compute the gates and e_perp of encodings, which no layer and no timestep changes."""
        concepts = override_settings(self.edited, biases, temperatures)
        edit = replace(self._stacked_edit, **gate_settings(concepts, self.device))
        super_encoding = None if super_encoding is None else super_encoding.to(self.device)
        context = edit.context(encoding.to(self.device), super_encoding=super_encoding, cache=True)
        return replace(context, pooled=None if pooled is None else pooled.to(self.device))

    @property
    def device(self) -> torch.device:
        """Where the layers are. The text encoder may be elsewhere, such as on the CPU to save memory."""
        return next(iter(self.text_layers.values())).to_k.weight.device

    @functools.cached_property
    def _stacked_edit(self) -> Edit:
        """The edit of all concepts, on the device. Moving many concepts there takes as long as several steps."""
        warn_covariance_mismatch(self.edited)
        return stack_concepts(self.edited, self.text_layers)

    def mask_concepts(self, context: PromptContext, texts: Sequence[str]) -> PromptContext:
        """Return the context with each prompt edited only by the concepts whose placeholders its text contains.

        Prompts of one batch may thus use different concepts, and each gets the result it would get if no other concept
        were loaded.

        Args:
            context: what `encode` returned for B prompts.
            texts: B texts; they may contain more than the prompts, such as the negative prompts.
        """
        acting = []
        for text in texts:
            used = find_placeholders([text], self.placeholders)
            acting.append([index in used for index, concept in enumerate(self.concepts) if not concept.is_word])
        if all(map(all, acting)):
            return context
        edit = self._stacked_edit
        mask = torch.tensor(acting, device=context.device)
        return context.mask_concepts(mask, edit.target_inputs, edit.duals, edit.projections)


def _given(inverse_covariance: Tensor | Callable[[], Tensor] | None) -> Tensor:
    if inverse_covariance is None:
        raise ValueError("a concept without a dual needs the inverse covariance of the text encoder")
    return inverse_covariance() if callable(inverse_covariance) else inverse_covariance
