"""Errors and warnings about prompts, the words in them, and the concepts they use."""
from __future__ import annotations

import difflib
import functools
import logging
import re
import string
import unicodedata
from collections.abc import Sequence

from torch import Tensor

from ldm.checkpoints.families import family_of_width
from ldm.common.errors import UserError
from ldm.common.words import fold_word, split_at_placeholders
from ldm.concepts.concept import Concept
from ldm.concepts.duals import energy_mismatches
from ldm.concepts.placeholders import PLACEHOLDER, find_placeholders
from ldm.concepts.prompt_weights import LITERALLY, check_syntax
from ldm.modules.encoders.prompts import PromptEncoder

log = logging.getLogger(__name__)

MAX_LISTED_WORDS = 100  # in an error message


def check_super_category(encoder: PromptEncoder, super_category: str) -> None:
    """Check that the text encoder can express a super-category.

    Log a warning if it knows only some of the words.

    Raises:
        UserError: the super-category contains a placeholder, or no word that the text encoder knows.
    """
    if re.search(PLACEHOLDER, super_category):
        raise UserError(f"the super-category {super_category!r} contains a placeholder; give plain words, such as "
                        "\"teddy bear\"")
    has_word = any(letter.isalnum() or unicodedata.category(letter) == "So" for letter in super_category)  # So: emoji
    if not has_word:
        raise UserError(f"the super-category {super_category!r} has no word in it; give a plain one, such as "
                        "\"teddy bear\"")
    unknown = encoder.unknown_words(super_category)
    if not unknown:
        return

    known_parts = {word.strip(string.punctuation) for word in super_category.split()} - {"", *unknown}
    if not known_parts:
        suggestions = _similar_words(unknown, encoder.known_words())
        raise UserError(f"the super-category {super_category!r} cannot be expressed: this text encoder does not know "
                        f"the word {', '.join(unknown)}; give another, it knows {', '.join(suggestions)}")
    log.warning("warning: this text encoder does not know %s; it ignores that part of the super-category",
                ", ".join(unknown))


def _similar_words(unknown: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return known words that are spelled like the unknown ones, or else the first known words."""
    similar = []
    for word in unknown:
        similar += difflib.get_close_matches(word, known)
    return similar or list(known[:MAX_LISTED_WORDS])


def warn_unknown_words(encoder: PromptEncoder, prompts: Sequence[str], placeholders: Sequence[str] = ()) -> None:
    """Log a warning that lists the words of the prompts, except placeholders, that the text encoder does not know."""
    texts = []
    for prompt in prompts:
        texts += [part for part in split_at_placeholders(prompt, placeholders) if isinstance(part, str)]
    unknown = encoder.unknown_words(" ".join(texts))
    if unknown:
        log.warning("warning: this text encoder does not know %s; images will not show it", ", ".join(unknown))


def check_prompts(prompts: Sequence[str], placeholders: Sequence[str], prompt_weights: bool = True) -> None:
    """Raise UserError if a prompt contains a `<word>` that is not one of the placeholders, or unsupported syntax.

    Args:
        prompts: any prompts.
        placeholders: those of the loaded concepts.
        prompt_weights: whether brackets weight words; False: syntax of other tools is ordinary text.
    """
    if prompt_weights:
        for prompt in prompts:
            check_syntax(prompt, placeholders, LITERALLY)
    check_placeholders(prompts, placeholders)


def check_placeholders(prompts: Sequence[str], placeholders: Sequence[str]) -> None:
    """Raise UserError if a prompt contains a `<word>` that is not one of the placeholders."""
    known = {fold_word(word) for word in placeholders}
    for prompt in prompts:
        for word in re.findall(PLACEHOLDER, prompt):
            if fold_word(word) not in known:
                loaded = f"loaded are {', '.join(placeholders)}" if known else "none is loaded, see --concept"
                raise UserError(f"the prompt {prompt!r} names {word}, but no loaded concept has that word; {loaded}")


def warn_unused_concepts(prompts: Sequence[str], placeholders: Sequence[str]) -> None:
    """Log a warning for each placeholder that no prompt contains."""
    used = find_placeholders(prompts, placeholders)
    for index, word in enumerate(placeholders):
        if index not in used:
            log.warning("warning: concept %s is loaded, but its word does not occur in the prompt", word)


def check_width(label: str, embedding: Tensor, width: int) -> None:
    """Raise UserError if a concept's word embedding does not have the width of the model's.

    Args:
        label: the concept, for the message.
        embedding: (k, width) of the concept.
        width: that of the text encoder's words.
    """
    if embedding.shape[1] != width:
        kind = family_of_width(embedding.shape[1]).name
        raise UserError(f"concept {label} does not fit this model: its embedding has {embedding.shape[1]} numbers, as "
                        f"for {kind}, words have {width}; load the model it was trained on, or train it again")


def warn_covariance_mismatch(concepts: Sequence[Concept]) -> None:
    """Log a warning for each concept whose dual was computed with another C^-1 than that of its training.

    Args:
        concepts: with their duals.
    """
    for concept, energy in energy_mismatches(concepts):
        _log_covariance_mismatch(concept.label, concept.target_energy, energy)


@functools.cache
def _log_covariance_mismatch(label: str, trained: float, current: float) -> None:
    """Log the warning; cached, so that a run that encodes many prompts logs it once."""
    log.warning("warning: concept %s was trained with another covariance than the one in use (||i*||^2 was %.4g and is "
                "%.4g), so its gate may respond differently; use the config of its training run (--config "
                "logs/.../configs/...-project.yaml)", label, trained, current)
