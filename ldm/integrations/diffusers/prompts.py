"""Encode the prompts of a call of a pipeline under the edit of concepts, as packed rows."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import SUPER_CATEGORY, Concept
from ldm.concepts.placeholders import find_placeholders
from ldm.integrations.diffusers import words
from ldm.integrations.diffusers.rows import Rows, packed_width
from ldm.integrations.diffusers.words import Tower
from ldm.modules.edit import Edit

PROMPT_TEXTS = (("prompt", "negative_prompt"), ("prompt_2", "negative_prompt_2"))  # of each text encoder
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
POOLED_RESULTS = (2, 3)  # where SDXL's `encode_prompt` returns pooled vectors


class Settings(Protocol):
    """What encoding needs of the loaded concepts."""

    concepts: Sequence[Concept]
    global_locking: bool
    tag: int

    def edit(self, device: torch.device) -> Edit: ...


class EncodeCall:
    """A call of a pipeline's `encode_prompt`.

    Args:
        original: the pipeline's own method.
        args, kwargs: what it was called with.
    """

    def __init__(self, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.original = original
        self.bound = inspect.signature(original).bind(*args, **kwargs)

    def get(self, name: str) -> Any:
        return self.bound.arguments.get(name)

    def texts(self, name: str) -> list[str]:
        """Return the prompts of an argument; an empty list if it is not given."""
        value = self.get(name)
        return [value] if isinstance(value, str) else list(value or [])

    def all_texts(self) -> list[str]:
        return [text for names in PROMPT_TEXTS for name in names for text in self.texts(name)]

    @property
    def batch_size(self) -> int:
        """B, the number of prompts."""
        if self.get("prompt") is not None:
            return len(self.texts("prompt"))
        return next((len(self.get(name)) for name in EMBEDS if self.get(name) is not None), 0)

    def run(self, replace_text: Callable[[str], str] = str) -> list[Any]:
        """Call the original method, with each text replaced; return its results."""
        changed = dict(self.bound.arguments)
        for name in (name for names in PROMPT_TEXTS for name in names):
            value = changed.get(name)
            if value is not None:
                changed[name] = replace_text(value) if isinstance(value, str) else list(map(replace_text, value))
        call = inspect.BoundArguments(self.bound.signature, changed)
        return list(self.original(*call.args, **call.kwargs))


def encode_packed(pipe: DiffusionPipeline, call: EncodeCall, settings: Settings, width: int) -> list[Any]:
    """Return what `encode_prompt` returns, with embeddings as packed rows if a concept acts on one of the prompts.

    Negative prompts go through the same edit as their prompts, as everywhere in this project (see
    `ldm.inference.encoding.EncodedPrompts`). Embeddings that a caller passes in keep the edit with which they were
    encoded.

    Args:
        width: d, of the text encoding.

    Raises:
        UserError: the word of a concept is cut off; prompts for two text encoders name different concepts; or
            embeddings were encoded with other concepts.
    """
    given = _take_packed(call, settings, width)
    acting = _acting(call, given, [concept.placeholder for concept in settings.concepts])
    if not acting.any() and not given:
        return call.run()

    encodings = _Encodings(pipe, call, settings.concepts)
    count = len(settings.concepts)
    result = encodings.locked([False] * count)
    super_result = encodings.locked([True] * count) if settings.global_locking else None
    for index in range(2):
        encoding = result[index]
        if encoding is None:
            continue
        rows_of_prompt = len(encoding) // call.batch_size
        if index in given:
            kept = given[index].repeat_interleave(rows_of_prompt, 0)
            result[index] = kept.to(encoding)
        else:
            rows = acting.repeat_interleave(rows_of_prompt, 0).to(encoding.device)
            super_encoding = None if super_result is None else super_result[index]
            result[index] = _edited(encoding, super_encoding, rows, settings).pack(settings.tag)

    # The pooled vector reaches the U-Net outside of cross-attention, so each concept has its own choice there.
    if len(result) > max(POOLED_RESULTS):
        pooled = encodings.locked([concept.pooled == SUPER_CATEGORY for concept in settings.concepts])
        for index in POOLED_RESULTS:
            result[index] = pooled[index]
    return result


class _Encodings:
    """Calls of a pipeline's `encode_prompt` with learned words in place of placeholders.

    Raises:
        UserError: as `encode_packed`.
    """

    def __init__(self, pipe: DiffusionPipeline, call: EncodeCall, concepts: Sequence[Concept]) -> None:
        self.call, self.towers = call, Tower.all_of(pipe)
        self.placeholders = [concept.placeholder for concept in concepts]
        self.carriers = words.choose_carriers(self.towers, len(concepts), call.all_texts())
        self.learned = [words.concept_vectors(self.towers, concept) for concept in concepts]
        self.super = [words.super_vectors(self.towers, concept) for concept in concepts]
        self._results: dict[tuple[bool, ...], list[Any]] = {}
        self._check(pipe)

    def locked(self, locked: Sequence[bool]) -> list[Any]:
        """Return the results for prompts with the super-category in place of those concepts that are locked."""
        key = tuple(locked)
        if key not in self._results:
            vectors = [self.super[index] if is_locked else self.learned[index] for index, is_locked in enumerate(key)]
            with words.replaced_embeddings(self.towers, list(self.carriers.values()), vectors):
                self._results[key] = self.call.run(self._with_carriers)
        return list(self._results[key])

    def _with_carriers(self, text: str) -> str:
        return words.replace_placeholders(text, self.placeholders, list(self.carriers))

    def _check(self, pipe: DiffusionPipeline) -> None:
        """Check that every text encoder reads the same concepts at the same positions."""
        tokens = self.carriers.values()
        for first_name, second_name in zip(*PROMPT_TEXTS, strict=True):
            positions = []
            for tower, name in zip(self.towers, (first_name, second_name), strict=False):
                texts = self.call.texts(name) or self.call.texts(first_name)
                prompts = [self._with_carriers(text) for text in texts]
                if isinstance(pipe, TextualInversionLoaderMixin):  # its words may take several tokens
                    prompts = [pipe.maybe_convert_prompt(prompt, tower.tokenizer) for prompt in prompts]
                positions.append(words.find_carriers(tower, prompts, tokens))
            if any(other != positions[0] for other in positions):
                raise UserError(f"{first_name} and {second_name} must name the same concepts at the same positions; "
                                f"leave {second_name} out")


def _take_packed(call: EncodeCall, settings: Settings, width: int) -> dict[int, Tensor]:
    """Replace packed embeddings in the call by their encodings; return the packed ones, by their place in `EMBEDS`.

    Raises:
        UserError: they were encoded with other concepts than those that are loaded.
    """
    given = {}
    for index, name in enumerate(EMBEDS):
        packed = call.get(name)
        if packed is None or packed.shape[-1] == width:
            continue
        expected = packed_width(width, len(settings.concepts))
        if packed.shape[-1] != expected or bool((packed[..., -1] != settings.tag).any()):
            raise UserError(f"{name} were encoded for another model, or before concepts were loaded or unloaded; "
                            "encode them again with pipe.encode_prompt")
        given[index] = packed
        call.bound.arguments[name] = Rows.unpack(packed, width).encoding
    return given


def _acting(call: EncodeCall, given: dict[int, Tensor], placeholders: Sequence[str]) -> Tensor:
    """Return which concepts edit which prompts, (B, J) booleans: those that a prompt or its negative prompt names."""
    acting = torch.zeros(call.batch_size, len(placeholders), dtype=torch.bool)
    for name in (name for names in PROMPT_TEXTS for name in names):
        texts = call.texts(name)
        for row, text in enumerate(texts[:len(acting)] if len(texts) > 1 else texts * len(acting)):
            acting[row, sorted(find_placeholders([text], placeholders))] = True
    for packed in given.values():
        count = len(placeholders)
        acting |= packed[:, 0, -1 - count:-1].bool().cpu()
    return acting


@torch.no_grad()
def _edited(encoding: Tensor, super_encoding: Tensor | None, acting: Tensor, settings: Settings) -> Rows:
    """Return prompts (B, N, d) under the edit of the concepts that act on each, (B, J)."""
    edit = settings.edit(encoding.device)
    context = edit.context(encoding.float()).mask_concepts(acting, edit.target_inputs, edit.duals, edit.projections)
    trained = torch.tensor([bool(concept.target_outputs_k) for concept in settings.concepts], device=encoding.device)

    # Keys: of e_perp + sum_j g_j i_super_j, so that W_K makes g_j o*_K of it; or of the super-category's prompt.
    if super_encoding is None:
        super_inputs = torch.stack([concept.super_input for concept in settings.concepts]).to(context.gates)
        key_gates = context.gates * trained
        key_input = context.projected + (context.gates - key_gates) @ super_inputs
    else:
        key_gates, key_input = torch.zeros_like(context.gates), super_encoding
    acting_tokens = acting[:, None].expand(context.gates.shape)
    return Rows(encoding, context.projected, key_input, context.gates, key_gates, acting_tokens)
