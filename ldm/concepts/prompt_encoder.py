"""Prompts in which the words of learned concepts stand, encoded for a model that has never heard of them."""
from __future__ import annotations

import copy
import difflib
import functools
import logging
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.words import split_at_placeholders
from ldm.concepts.concept import Concept, base_fingerprint, check_base, gate_settings, stack_concepts
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.modules.context import Edit, PromptContext, TextLayer
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.rank_one import energy

log = logging.getLogger(__name__)

MOST_WORDS = 100  # that an error lists
ENERGY_TOLERANCE = 0.02  # of ||i*||^2; the 16 bits of files change that of the mini model's by 0.003 at most
PLACEHOLDER = r"<[^\s<>]+>"  # what in a prompt is surely meant to be one


class TextEncoder(Protocol):
    """What the text encoders of `ldm.modules.encoders.modules` offer."""

    token_table: Tensor

    def word_pieces(self, text: str) -> list[int]: ...

    def unknown_words(self, text: str) -> list[str]: ...

    def known_words(self) -> list[str]: ...

    def tokenize(self, prompts: Sequence[str], placeholders: Sequence[str] = (),
                 counts: Sequence[int] | None = None) -> Tensor: ...

    def encode_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor: ...


class PromptTokens(Protocol):
    """What knows how prompts become tokens: `ConceptPromptEncoder`, or `FinetunedPromptEncoder` of other methods."""

    encoder: TextEncoder

    def tokens(self, prompts: Sequence[str]) -> Tensor: ...


def word_positions(encoder: PromptTokens, prompt: str, word: str) -> Tensor:
    """(N,) booleans, true at all tokens of `word`, a placeholder or plain words, wherever it stands in the prompt.

    Raises:
        UserError: it does not.
    """
    row, alone = encoder.tokens([prompt, word])
    learned = alone[alone >= len(encoder.encoder.token_table)]
    pieces = learned if len(learned) else torch.tensor(encoder.encoder.word_pieces(word), dtype=row.dtype)
    places = torch.zeros(len(row), dtype=torch.bool)
    if len(pieces):
        starts = (row.unfold(0, len(pieces), 1) == pieces).all(1).nonzero()
        places[starts + torch.arange(len(pieces))] = True
    if not places.any():
        raise UserError(f"the word {word!r} does not stand in the prompt {prompt!r}; name one that does")
    return places


def check_super_category(encoder: TextEncoder, words: str) -> None:
    """Raises a UserError for a super-category that says nothing to the text encoder; warns of single such words."""
    if re.search(PLACEHOLDER, words):
        raise UserError(f"the super-category {words!r} holds a placeholder; give plain words, such as \"teddy bear\"")
    if not any(letter.isalnum() or unicodedata.category(letter) == "So" for letter in words):  # So: emoji
        raise UserError(f"the super-category {words!r} has no word in it; give a plain one, such as \"teddy bear\"")
    unknown = encoder.unknown_words(words)
    if not unknown:
        return
    if not {word.strip(string.punctuation) for word in words.split()} - {"", *unknown}:
        known = encoder.known_words()
        near = [close for word in unknown for close in difflib.get_close_matches(word, known)] or known[:MOST_WORDS]
        raise UserError(f"the super-category {words!r} cannot be expressed: this text encoder was never taught the "
                        f"word {', '.join(unknown)}; give another, it knows {', '.join(near)}")
    log.warning("warning: this text encoder was never taught %s; of the super-category it sees only the rest",
                ", ".join(unknown))


def warn_unknown_words(encoder: TextEncoder, prompts: Sequence[str], placeholders: Sequence[str] = ()) -> None:
    """A warning that names the words of the prompts, other than placeholders, that say nothing to the text encoder."""
    texts = [part for prompt in prompts for part in split_at_placeholders(prompt, placeholders)
             if isinstance(part, str)]
    unknown = encoder.unknown_words(" ".join(texts))
    if unknown:
        log.warning("warning: this text encoder was never taught %s; pictures will not follow", ", ".join(unknown))


def check_placeholders(prompts: Sequence[str], placeholders: Sequence[str]) -> None:
    """Raises a UserError for a <word> in the prompts that no concept has."""
    loaded = {word.lower() for word in placeholders}
    for prompt in prompts:
        for word in re.findall(PLACEHOLDER, prompt):
            if word.lower() not in loaded:
                have = f"loaded are {', '.join(placeholders)}" if loaded else "none is loaded, see --concept"
                raise UserError(f"the prompt {prompt!r} names {word}, but no loaded concept has that word; {have}")


def placeholders_in(texts: Sequence[str], placeholders: Sequence[str]) -> set[int]:
    """The numbers of those placeholders that stand in some of the texts."""
    return {part for text in texts for part in split_at_placeholders(text, placeholders) if isinstance(part, int)}


def warn_unused_concepts(prompts: Sequence[str], placeholders: Sequence[str]) -> None:
    """A warning for each concept that no prompt names."""
    named = placeholders_in(prompts, placeholders)
    for number, word in enumerate(placeholders):
        if number not in named:
            log.warning("warning: concept %s is loaded, but its word does not stand in the prompt", word)


def warn_covariance_mismatch(concepts: Sequence[Concept], target_inputs: Tensor, inverse_covariance: Tensor) -> None:
    """A warning for each concept, with i* of (J, d), that was taught with another C^-1 than this (d, d)."""
    for concept, here in zip(concepts, energy(target_inputs, inverse_covariance).tolist(), strict=True):
        taught = concept.target_energy
        if taught is not None and abs(here - taught) > ENERGY_TOLERANCE * taught:
            _log_covariance_mismatch(concept.label, taught, here)


@functools.cache
def _log_covariance_mismatch(label: str, taught: float, here: float) -> None:
    """The warning: one line, however often a run encodes prompts with the concept."""
    log.warning("warning: concept %s was taught with another covariance than it is drawn with (||i*||^2 was %.4g and "
                "is %.4g), so that its gate may open otherwise; draw with its run's config (--config "
                "logs/.../configs/...-project.yaml)", label, taught, here)


def override_settings(concepts: Sequence[AnyConcept], biases: Sequence[float | None] | None = None,
                  temperatures: Sequence[float | None] | None = None, all_layers: bool = False) -> list[AnyConcept]:
    """The concepts with beta or tau in place of their own: one value for all, or one for each; None leaves its own.

    Args:
        all_layers: draw with the target outputs of all layers, whichever the concepts would use.

    Raises:
        UserError: another number of values, or a concept that has no gate.
    """
    changed = list(concepts)
    for flag, name, values in (("--bias", "bias", biases), ("--temperature", "temperature", temperatures),
                               ("--all_layers", "used_layers", [[]] if all_layers else None)):
        if values is None:
            continue
        plain = [concept for concept in changed if isinstance(concept, FinetunedConcept)]
        if plain:
            raise UserError(f"{flag}: concept {plain[0].label} was learned {plain[0].summary} and has none; "
                            "leave the flag out")
        if len(values) not in (1, len(changed)):
            raise UserError(f"{len(values)} values of {name} for {len(changed)} concepts; give one, or one each")
        each = values if len(values) == len(changed) else [values[0]] * len(changed)
        changed = [concept if value is None else replace(concept, **{name: value})
                   for concept, value in zip(changed, each, strict=True)]
    return changed


def check_distinct(placeholders: Sequence[str]) -> None:
    """Raises a UserError where two placeholders are the same word, as prompts read them."""
    if len({word.lower() for word in placeholders}) < len(placeholders):
        raise UserError(f"two concepts share a placeholder ({', '.join(placeholders)}, where case does not "
                        "count); merge_embeddings.py --placeholders gives them different ones")


def check_width(label: str, embedding: Tensor, table: Tensor) -> None:
    """Raises a UserError where a concept's embedding (k, width) is of another width than the words of the model."""
    if embedding.shape[1] != table.shape[1]:
        raise UserError(f"concept {label} does not fit this model: its embedding has {embedding.shape[1]} numbers, "
                        f"words have {table.shape[1]}; train it again")


class ConceptPromptEncoder:
    """Encodes prompts under the edit of some concepts.

    Args:
        encoder: the base model's text encoder.
        text_layers: its cross-attention layers by name, from `name_text_layers`.
        concepts: none or more, with different placeholders.
        inverse_covariance: C^-1 of the text encoder, (d, d), or what computes it: called where there are concepts,
            after they have been checked, since it may take long.

    Raises:
        UserError: a concept belongs to another base model, or two have the same placeholder.
    """

    def __init__(self, encoder: TextEncoder, text_layers: dict[str, TextLayer], concepts: Sequence[Concept],
                 inverse_covariance: Tensor | Callable[[], Tensor] | None = None) -> None:
        self.encoder, self.text_layers, self.concepts = encoder, text_layers, list(concepts)
        self.placeholders = [concept.placeholder for concept in self.concepts]
        check_distinct(self.placeholders)
        if self.concepts and inverse_covariance is None:
            raise ValueError("concepts need the inverse covariance of the text encoder")
        fingerprint = base_fingerprint(text_layers) if self.concepts else ""
        table = encoder.token_table
        for concept in self.concepts:
            check_base(concept, fingerprint)
            check_width(concept.label, concept.embedding, table)
        if self.concepts:
            found = inverse_covariance() if callable(inverse_covariance) else inverse_covariance
            self.inverse_covariance = found.to(table.device)
        self._fewer: tuple[list[int], ConceptPromptEncoder] | None = None

    def subset_for(self, texts: Sequence[str]) -> ConceptPromptEncoder:
        """An encoder of just those concepts whose words stand in some of the texts: what others cost is saved.

        The last one is kept: to draw the same concepts again brings nothing to the device.
        """
        places = sorted(placeholders_in(texts, self.placeholders))
        if len(places) == len(self.concepts):
            return self
        if self._fewer is None or self._fewer[0] != places:
            fewer = copy.copy(self)
            fewer.__dict__.pop("_stacked", None)
            fewer.concepts = [self.concepts[place] for place in places]
            fewer.placeholders = [concept.placeholder for concept in fewer.concepts]
            fewer._fewer = None
            self._fewer = places, fewer
        return self._fewer[1]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(B, N) numbers of word pieces, those of placeholders past the vocabulary's; raises as `encode` does."""
        return self.encoder.tokenize(prompts, self.placeholders)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], biases: Sequence[float] | None = None,
               temperatures: Sequence[float] | None = None, global_locking: bool = False) -> PromptContext:
        """What the cross-attention layers need of the prompts, for use at every timestep.

        Args:
            biases, temperatures: beta and tau of each concept in place of its own.
            global_locking: keys of the whole prompt come from that with super-categories in the concepts' stead.

        Raises:
            UserError: a prompt is too long, or there is not one bias or temperature per concept.
        """
        tokens = self.tokens(prompts)
        if not self.concepts:
            return PromptContext.plain(self.encoder.encode_tokens(tokens), cache=True)
        table = self.encoder.token_table
        encoding = self.encoder.encode_tokens(tokens, torch.cat([c.embedding for c in self.concepts]).to(table.device))
        instead = None
        if global_locking:
            vectors = torch.cat([word_vector(self.encoder, concept.super_category) for concept in self.concepts])
            instead = self.encoder.encode_tokens(tokens, vectors)
        concepts = override_settings(self.concepts, biases, temperatures)
        edit = replace(self._stacked, **gate_settings(concepts, table.device))
        return edit.context(encoding, self.inverse_covariance, super_encoding=instead, cache=True)

    @functools.cached_property
    def _stacked(self) -> Edit:
        """The concepts' numbers on the device: of many, to bring them there takes as long as several steps."""
        edit = stack_concepts(self.concepts, self.text_layers)
        warn_covariance_mismatch(self.concepts, edit.target_inputs, self.inverse_covariance)
        return edit

    def mask_concepts(self, context: PromptContext, texts: Sequence[str]) -> PromptContext:
        """What `encode` gave, with just those concepts acting on each prompt whose words stand in its text of `texts`.

        So prompts of one batch may use different concepts, and each is drawn as if no other were loaded.
        """
        each = [placeholders_in([text], self.placeholders) for text in texts]
        named = [[number in some for number in range(len(self.concepts))] for some in each]
        if all(map(all, named)):
            return context
        target_inputs = torch.stack([concept.target_input for concept in self.concepts]).to(self.inverse_covariance)
        return context.mask_concepts(torch.tensor(named, device=context.device), target_inputs, self.inverse_covariance,
                                  [concept.projection for concept in self.concepts])
