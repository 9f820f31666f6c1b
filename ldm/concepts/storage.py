"""Load and save concept files of any method."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.checkpoints.early_checks import check_concept, holds_image_embedding
from ldm.common.file_formats import Format, format_of
from ldm.common.files import load_metadata
from ldm.common.paths import user_path
from ldm.concepts import concept_file, finetuned_concept_file
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.embedding_file import is_word_file, load_learned_words
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.concepts.finetuned_concept_file import load_finetuned_concepts, save_finetuned_concepts
from ldm.concepts.merging import merge_concepts

log = logging.getLogger(__name__)

TEXTUAL_INVERSION = "textual-inversion"
UNKNOWN_SUPER_CATEGORY = "thing"  # where a file does not say what kind of subject a placeholder is


def load_concepts(path: str | Path) -> list[AnyConcept]:
    """Load the concepts of a file, in its order, as float32 on the CPU. Words beside concepts of Perfusion come last.

    Files of Textual Inversion's public code, and of other tools that follow it, do not say their base model: only the
    width is checked. What a file is follows from its content, not from its suffix.

    Raises:
        UserError: the file is missing, or is not a valid concept file of this version or an earlier one.
    """
    check_concept(path)
    is_public = format_of(user_path(path)) in (Format.ZIP, Format.PICKLE) or holds_image_embedding(user_path(path))
    metadata = None if is_public else load_metadata(path)
    if metadata is None or is_word_file(path, metadata):
        return [FinetunedConcept(TEXTUAL_INVERSION, word.word, UNKNOWN_SUPER_CATEGORY, word.vectors.float(),
                                 parameter_count=word.vectors.numel(), source=str(path), word_parts=word.word_parts)
                for word in load_learned_words(path)]
    if finetuned_concept_file.METADATA_KEY not in metadata:
        return load_perfusion_concepts(path)
    words = load_finetuned_concepts(path)
    return [*load_perfusion_concepts(path), *words] if concept_file.METADATA_KEY in metadata else words


def save_concepts(path: str | Path, concepts: Sequence[AnyConcept],
                  precision: torch.dtype | None = torch.float16) -> Path:
    """Write concepts of one method, and words, to one file. The file is complete or not written at all.

    Args:
        path: the file; an existing one is replaced.
        concepts: at least one.
        precision: as for `ldm.concepts.concept_file.save_perfusion_concepts`.

    Raises:
        UserError: the training of a concept diverged, or the file cannot be written.
    """
    edits = [concept for concept in concepts if isinstance(concept, Concept)]
    others = [concept for concept in concepts if isinstance(concept, FinetunedConcept)]
    if others and not edits:
        return save_finetuned_concepts(path, others, precision)
    return save_perfusion_concepts(path, edits, precision, words=others)


def read_concepts(concepts: Sequence[str | Path | AnyConcept], loaded: Sequence[AnyConcept] = ()) -> list[AnyConcept]:
    """Return the concepts of `loaded` and of all files. Equal placeholders are renamed, and the new names logged.

    Raises:
        UserError: a file is not a concept file, or the concepts are of different methods or base models.
    """
    given = list(loaded)
    for concept in concepts:
        given += load_concepts(concept) if isinstance(concept, str | Path) else [concept]
    merged = merge_concepts(given) if given else []
    for concept, before in zip(merged, given, strict=True):
        if concept.placeholder != before.placeholder:
            log.info("%s stands for the %s of %s", concept.placeholder, before.placeholder, concept.source)
    return merged
