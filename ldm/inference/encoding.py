"""Encode each distinct prompt once for any number of images, under the concepts that it names."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.common.paths import resolve_path
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.concepts.finetuned_prompt_encoder import FinetunedPromptEncoder
from ldm.concepts.fingerprint import BaseModel
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.concepts.prompt_weights import Prompt, check_syntax, parse_prompt, restore_mean
from ldm.inference.requests import GenerationRequest
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.covariance_files import cached_covariance, load_covariance_for
from ldm.modules.rank_one import invert_covariance

PROMPTS_AT_A_TIME = 64  # encodings of a file of thousands of prompts would take gigabytes

UNCONDITIONAL = None  # in place of the empty negative prompt, where models do not read its encoding

AnyPromptEncoder = ConceptPromptEncoder | FinetunedPromptEncoder


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts encoded once, for any number of images.

    Negative prompts (such as the empty one) go through the same edit as the others. So h = W e_perp + g o* acts on both
    halves of the guidance batch, and guidance amplifies the difference between the prompts, not that between an edited
    and an unedited layer. A concept acts only on images whose prompts name it.

    Attributes:
        context: (P, N, d), each distinct prompt once, under all concepts that any of them names.
        rows: prompt -> its row in `context`; that of the empty negative prompt is at `UNCONDITIONAL`.
        encoder: the encoder that made it; None if nothing edits the prompts.
        weights: (P, N), of the tokens, which `select` and `for_requests` apply; None: all are 1.
    """

    context: PromptContext
    rows: dict[str | None, int]
    encoder: AnyPromptEncoder | None = None
    weights: Tensor | None = None

    def select(self, prompts: Sequence[str]) -> PromptContext:
        """Return (B, N, d): one row for each of `prompts`, which may repeat."""
        return self._weighted(self._unweighted(prompts), prompts)

    def for_requests(self, requests: Sequence[GenerationRequest]) -> tuple[PromptContext, PromptContext]:
        """Return prompts and negative prompts of B images, (B, N, d) each, under the concepts that either names."""
        texts = [f"{request.prompt}\n{request.negative_prompt}" for request in requests]
        negatives = [request.negative_prompt or UNCONDITIONAL for request in requests]
        contexts = []
        for prompts in ([request.prompt for request in requests], negatives):
            context = self._unweighted(prompts)
            if self.encoder is not None:
                context = self.encoder.mask_concepts(context, texts)
            contexts.append(self._weighted(context, prompts))
        return contexts[0], contexts[1]

    def _unweighted(self, prompts: Sequence[str | None]) -> PromptContext:
        return self.context.select([self.rows[prompt] for prompt in prompts])

    def _weighted(self, context: PromptContext, prompts: Sequence[str | None]) -> PromptContext:
        """Return the context of `prompts` with the weights of their tokens, which act after the edit."""
        if self.weights is None:
            return context
        return context.scale_tokens(self.weights[[self.rows[prompt] for prompt in prompts]])


def base_model_of(model: Any) -> BaseModel:
    """Return what identifies the base model.

    A U-Net in training no longer shows it, so a model that learns concepts stores it as `base_model`.
    """
    stored = getattr(model, "base_model", None)
    if stored is not None:
        return stored
    checkpoint = getattr(model, "initial_weights_path", None)
    return BaseModel.of(name_text_layers(model.model.diffusion_model), checkpoint)


def build_prompt_encoder(model: Any, concepts: Sequence[AnyConcept], covariance: str | None = None
                         ) -> AnyPromptEncoder:
    """Build the encoder of prompts for `model` with `concepts` in them.

    C^-1 is the model's own if it has one (`Perfusion`); otherwise that of `covariance`; otherwise that of the default
    captions, which takes time when it is computed first.

    Args:
        model: a text-to-image model; it may be in training.
        concepts: all of one method, except words; none for the base model alone.
        covariance: file of the text encoder's covariance C.

    Raises:
        UserError: a concept belongs to another base model, or two have the same placeholder.
    """
    encoder, inverse_covariance = model.cond_stage_model, inverse_covariance_of(model, covariance)
    unet = model.model.diffusion_model
    text_layers = name_text_layers(unet)
    if concepts and all(isinstance(concept, FinetunedConcept) for concept in concepts):
        return FinetunedPromptEncoder(encoder, unet, concepts, base_model_of(model), inverse_covariance)
    base = base_model_of(model) if concepts else None
    return ConceptPromptEncoder(encoder, text_layers, concepts, inverse_covariance, base)


def inverse_covariance_of(model: Any, covariance: str | None = None) -> Callable[[], Tensor]:
    """Return a function that returns C^-1 (d, d); arguments as for `build_prompt_encoder`."""
    encoder = model.cond_stage_model

    def inverse_covariance() -> Tensor:
        own = getattr(model, "inverse_covariance", None)
        if own is not None:
            return own()
        if covariance is not None:
            return invert_covariance(load_covariance_for(resolve_path(covariance), encoder))
        return invert_covariance(cached_covariance(encoder))

    return inverse_covariance


def encode_prompts(encoder: AnyPromptEncoder, prompts: Sequence[str], global_locking: bool = False,
                   prompt_weights: bool = True) -> EncodedPrompts:
    """Encode each distinct prompt, and the empty one, once, under the concepts that some of them name.

    Args:
        encoder: see `build_prompt_encoder`.
        prompts: negative ones among them.
        global_locking: see `ConceptPromptEncoder.encode`.
        prompt_weights: whether brackets weight words (`ldm.concepts.prompt_weights`).

    Raises:
        UserError: a prompt is too long or has syntax that is not supported, or the method has no keys to lock.
    """
    distinct = list(dict.fromkeys([*prompts, ""]))
    rows: dict[str | None, int] = {prompt: row for row, prompt in enumerate(distinct)}
    rows[UNCONDITIONAL] = rows[""]
    encoder = encoder.subset_for(distinct)
    parsed: list[Prompt] = list(distinct)
    if prompt_weights:
        for prompt in distinct:
            check_syntax(prompt, encoder.placeholders)
        parsed = [parse_prompt(prompt, encoder.placeholders) for prompt in distinct]
    contexts = [encoder.encode(parsed[start:start + PROMPTS_AT_A_TIME], global_locking=global_locking)
                for start in range(0, len(parsed), PROMPTS_AT_A_TIME)]
    if encoder.encoder.zeroes_unconditional:
        rows[UNCONDITIONAL] = len(parsed)
        contexts.append(encoder.encode_unconditional(global_locking))
        parsed.append("")
    context = PromptContext.cat(contexts) if len(contexts) > 1 else contexts[0]
    weights = encoder.token_weights(parsed)
    if weights is not None:
        weights = restore_mean(context.encoding, weights.to(context.device))
    return EncodedPrompts(context, rows, encoder, weights)
