"""Encode each distinct prompt once for any number of images, under the concepts that it names."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.common.paths import resolve_path
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.concepts.finetuned_prompt_encoder import FinetunedPromptEncoder
from ldm.concepts.fingerprint import BaseModel
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.inference.requests import GenerationRequest
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.covariance import cached_covariance, encoder_fingerprint, load_covariance
from ldm.modules.rank_one import invert_covariance

PROMPTS_AT_A_TIME = 64  # encodings of a file of thousands of prompts would take gigabytes

AnyPromptEncoder = ConceptPromptEncoder | FinetunedPromptEncoder


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts encoded once, for any number of images.

    Negative prompts (such as the empty one) go through the same edit as the others. So h = W e_perp + g o* acts on both
    halves of the guidance batch, and guidance amplifies the difference between the prompts, not that between an edited
    and an unedited layer. A concept acts only on images whose prompts name it.

    Attributes:
        context: (P, N, d), each distinct prompt once, under all concepts that any of them names.
        rows: prompt -> its row in `context`.
        encoder: the encoder that made it; None if nothing edits the prompts.
    """

    context: PromptContext
    rows: dict[str, int]
    encoder: AnyPromptEncoder | None = None

    def select(self, prompts: Sequence[str]) -> PromptContext:
        """Return (B, N, d): one row for each of `prompts`, which may repeat."""
        return self.context.select([self.rows[prompt] for prompt in prompts])

    def for_requests(self, requests: Sequence[GenerationRequest]) -> tuple[PromptContext, PromptContext]:
        """Return prompts and negative prompts of B images, (B, N, d) each, under the concepts that either names."""
        conditional = self.select([request.prompt for request in requests])
        unconditional = self.select([request.negative_prompt for request in requests])
        if self.encoder is None:
            return conditional, unconditional
        texts = [f"{request.prompt}\n{request.negative_prompt}" for request in requests]
        return self.encoder.mask_concepts(conditional, texts), self.encoder.mask_concepts(unconditional, texts)


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
        concepts: all of one method; none for the base model alone.
        covariance: file of the text encoder's covariance C.

    Raises:
        UserError: a concept belongs to another base model, or two have the same placeholder.
    """
    encoder = model.cond_stage_model

    def inverse_covariance() -> Any:
        own = getattr(model, "inverse_covariance", None)
        if own is not None:
            return own()
        if covariance is not None:
            return invert_covariance(load_covariance(resolve_path(covariance), encoder_fingerprint(encoder)))
        return invert_covariance(cached_covariance(encoder))

    unet = model.model.diffusion_model
    text_layers = name_text_layers(unet)
    if concepts and isinstance(concepts[0], FinetunedConcept):
        return FinetunedPromptEncoder(encoder, unet, concepts, base_model_of(model), inverse_covariance)
    base = base_model_of(model) if concepts else None
    return ConceptPromptEncoder(encoder, text_layers, concepts, inverse_covariance, base)


def encode_prompts(encoder: AnyPromptEncoder, prompts: Sequence[str], global_locking: bool = False) -> EncodedPrompts:
    """Encode each distinct prompt, and the empty one, once, under the concepts that some of them name.

    Args:
        encoder: see `build_prompt_encoder`.
        prompts: negative ones among them.
        global_locking: see `ConceptPromptEncoder.encode`.

    Raises:
        UserError: a prompt is too long, or the method has no keys to lock.
    """
    distinct = list(dict.fromkeys([*prompts, ""]))
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    encoder = encoder.subset_for(distinct)
    contexts = [encoder.encode(distinct[start:start + PROMPTS_AT_A_TIME], global_locking=global_locking)
                for start in range(0, len(distinct), PROMPTS_AT_A_TIME)]
    return EncodedPrompts(PromptContext.cat(contexts) if len(contexts) > 1 else contexts[0], rows, encoder)
