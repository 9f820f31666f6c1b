"""Start the words of concepts from embedding files, in place of their super-categories."""
from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.prompt_checks import check_width
from ldm.concepts.storage import load_concepts

log = logging.getLogger(__name__)


def read_initial_words(paths: Sequence[str], count: int, width: int) -> list[Tensor | None]:
    """Return the vectors (k, width) that the word of each concept starts from; None for its super-category.

    Args:
        paths: an embedding or concept file for each concept, or one for all of them; none: super-categories.
        count: number of concepts.
        width: of the model's word embeddings.

    Raises:
        UserError: the number of files is wrong, or one does not hold one word of this width.
    """
    if len(paths) not in (0, 1, count):
        raise UserError(f"init_embedding: {len(paths)} files for {count} concepts; give one for all, or one each")
    words: list[Tensor | None] = []
    for path in paths:
        concepts = load_concepts(path)
        if len(concepts) > 1:
            raise UserError(f"init_embedding {path}: holds {len(concepts)} words "
                            f"({', '.join(concept.placeholder for concept in concepts)}); give a file with one")
        check_width(concepts[0].label, concepts[0].word_vectors, width)
        words.append(concepts[0].word_vectors)
    return words if len(words) == count else (words or [None]) * count


def mean_vector(vectors: Tensor) -> Tensor:
    """Return the mean (1, width) of a word's vectors (k, width), for methods that learn one; log that it was taken."""
    if len(vectors) > 1:
        log.info("the word starts at the mean of the %d vectors of its init_embedding", len(vectors))
    return vectors.mean(0, keepdim=True)
