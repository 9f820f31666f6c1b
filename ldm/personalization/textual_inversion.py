"""Textual Inversion: Gal et al., "An Image is Worth One Word" (ICLR 2023, arXiv 2208.01618)."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.encoders.prompts import word_vector
from ldm.personalization.finetuning import FinetuningMethod


class TextualInversion(FinetuningMethod):
    """A frozen model whose vocabulary gains one word (Sec. 3, Eq. 2).

    Args (beside those of `FinetuningMethod`):
        vectors_per_word: number of vectors of the word, at least 1. All start at the super-category's embedding. More
            vectors say more about the concept and leave less to the rest of the prompt.

    Raises:
        UserError: `vectors_per_word` is below 1.
    """

    method = "textual-inversion"
    method_name = "Textual Inversion"

    def __init__(self, vectors_per_word: int = 1, **finetuning: Any) -> None:
        if vectors_per_word < 1:
            raise UserError(f"vectors_per_word {vectors_per_word}: a word has 1 or more")
        super().__init__(**finetuning)
        self.vectors_per_word = vectors_per_word

    def initial_vectors(self, super_category: str) -> tuple[Tensor, Tensor]:
        start = word_vector(self.cond_stage_model, super_category)
        return start.repeat(self.vectors_per_word, 1), start[:0]
