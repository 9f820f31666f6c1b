"""Celeb Basis: Yuan et al., "Inserting Anybody in Diffusion Models via Celeb Basis" (NeurIPS 2023, arXiv 2306.00926).

A new word stays in the span of known ones. At each of its positions it is the mean m of the names' embeddings, plus a
combination of unit length of their principal directions B (Sec. 3.3):

    v = m + rho B w / |w|

Only w is learned. Three differences from the authors' code:

* w is trained itself. There, a linear layer computes it from the features of a face recognizer, so that it is for faces
  only, and w is averaged over the photos and steps.
* rho is the root mean square distance of the names from m, so that a new word is as far from it as a known one. There,
  rho is 1, which suits the scale of Stable Diffusion's table only.
* w starts at the super-category's projection onto the basis.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.text_files import read_text, split_lines
from ldm.concepts.word_norms import relative_norm
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.kinds import EVERYDAY_KINDS
from ldm.modules.encoders.prompts import PromptEncoder, word_vector
from ldm.personalization.finetuning import FinetuningMethod
from ldm.personalization.initial_words import mean_vector

log = logging.getLogger(__name__)

KINDS = "kinds"  # the value of `word_basis` for everyday kinds of subjects


class WordBasis(NamedTuple):
    """Where words may be: around a mean, along principal directions.

    Attributes:
        mean: m, (width,).
        directions: B, (p, width), orthonormal, in descending order of the names' variance.
        radius: rho, a scalar.
    """

    mean: Tensor
    directions: Tensor
    radius: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, size: int) -> WordBasis:
        """Return the basis of M embeddings (M, width), with at most `size` and at most M - 1 directions."""
        mean = embeddings.double().mean(0)
        centered = embeddings.double() - mean
        directions = torch.linalg.svd(centered, full_matrices=False).Vh[:min(size, len(embeddings) - 1)]
        radius = centered.square().sum(1).mean().sqrt()
        return cls(mean.float(), directions.float(), radius.float())


class BasisWord(nn.Module):
    """The word of a concept: n vectors, each in a basis of its own.

    Args:
        bases: one per vector.
        start: (n, width), whose projections onto the bases are the first coefficients.
    """

    def __init__(self, bases: Sequence[WordBasis], start: Tensor) -> None:
        super().__init__()
        size = min(len(basis.directions) for basis in bases)
        self.register_buffer("mean", torch.stack([basis.mean for basis in bases]), persistent=False)
        self.register_buffer("radius", torch.stack([basis.radius for basis in bases])[:, None], persistent=False)
        self.register_buffer("directions", torch.stack([basis.directions[:size] for basis in bases]), persistent=False)
        offset = start.detach().float() - self.mean
        self.coefficients = nn.Parameter(F.normalize((self.directions @ offset[..., None])[..., 0], dim=-1))
        self.register_buffer("start", self().detach().clone(), persistent=False)

    def forward(self) -> Tensor:
        """Return the embeddings of the placeholder's tokens, (n, width)."""
        unit = F.normalize(self.coefficients, dim=-1)
        # A sum of products stays in 32 bits under autocast, unlike a product of matrices.
        return self.mean + self.radius * (unit[..., None] * self.directions).sum(1)

    def distance(self) -> Tensor:
        """Return the distance of the vectors from their start, relative to the start's norm."""
        return (self().detach() - self.start).norm() / self.start.norm().clamp(min=1e-12)

    def relative_norm(self, widths: Sequence[int]) -> Tensor:
        """Return the largest ratio of a vector's norm to that of its start; `widths` as for `word_norms.part_norms`."""
        return relative_norm(self().detach(), self.start, widths)

    @torch.no_grad()
    def restore_norms(self, widths: Sequence[int]) -> None:
        """Scale the coefficients to unit length. The vectors stay: the basis limits their norms."""
        self.coefficients.copy_(F.normalize(self.coefficients, dim=-1))


class CelebBasis(FinetuningMethod):
    """A frozen model whose vocabulary gains a word in the span of known ones.

    Args (beside those of `FinetuningMethod`, whose `embedding_lr` is the rate of the coefficients):
        word_basis: file of names, one per line, or "kinds" for the everyday kinds that the text encoder knows. Lines
            that start with "#" are left out.
        vectors_per_word: number of positions n. With 1, a name is the mean of its tokens' embeddings. With more, the
            basis of each position is that of the names' tokens there, as first names and surnames.
        basis_size: largest number p of directions; the paper's is 512.

    Raises:
        UserError: a number is below 1, or the names are missing or too few.
    """

    method = "celeb-basis"
    method_name = "Celeb Basis"

    def __init__(self, word_basis: str = KINDS, vectors_per_word: int = 2, basis_size: int = 512,
                 **finetuning: Any) -> None:
        for name, value in (("vectors_per_word", vectors_per_word), ("basis_size", basis_size)):
            if value < 1:
                raise UserError(f"{name} {value}: must be 1 or more")
        names = read_names(word_basis)
        super().__init__(**finetuning)
        self.bases = word_bases(self.cond_stage_model, names, vectors_per_word, basis_size, word_basis)

    def make_concept(self, dataset: ConceptPhotos, super_category: str) -> BasisWord:
        start = self.initial_words[len(self.concepts)]
        if start is None:
            start = word_vector(self.cond_stage_model, super_category)
        if len(start) != len(self.bases):
            start = mean_vector(start).expand(len(self.bases), -1)
        word = BasisWord(self.bases, start.to(self.bases[0].mean)).to(self.device)
        self.training_tokens(dataset, len(self.bases))  # checks that they fit
        return word

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [concept.coefficients for concept in self.concepts], "lr": self.embedding_lr}]


def read_names(word_basis: str) -> list[str]:
    """Return the names of a file, or everyday kinds for "kinds", each once.

    Raises:
        UserError: there is no such file, or it is no text in UTF-8.
    """
    if word_basis == KINDS:
        return list(EVERYDAY_KINDS)
    text = read_text(word_basis, f"word_basis {word_basis}", "one name per line")
    lines = [" ".join(line.split()) for line in split_lines(text)]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


@torch.no_grad()
def word_bases(encoder: PromptEncoder, names: Sequence[str], count: int, size: int, source: str = KINDS
               ) -> list[WordBasis]:
    """Return the basis of each position of a word.

    Args:
        encoder: its table has the embeddings.
        names: those with a word that was never trained are left out.
        count: number of positions.
        size: largest number of directions.
        source: where the names are from, for errors.

    Raises:
        UserError: fewer than two different words are left at a position.
    """
    known = [name for name in names if not encoder.unknown_words(name)]
    if len(known) < len(names) and source != KINDS:
        log.warning("warning: word_basis %s: %d of %d names are left out, as the text encoder does not know them",
                    source, len(names) - len(known), len(names))
    pieces = encoder.word_pieces_of(known)
    bases, counts = [], []
    for position in range(count):
        # Repeated words count once.
        groups = dict.fromkeys(tuple(own) if count == 1 else (own[position],) for own in pieces if position < len(own))
        if len(groups) < 2:
            raise UserError(f"word_basis {source}: {len(groups)} different words at position {position + 1} of names; "
                            "give hundreds of names, or lower vectors_per_word")
        rows = torch.cat([encoder.embed_pieces(list(group)).mean(0, keepdim=True) for group in groups])
        bases.append(WordBasis.of(rows.float().cpu(), size))
        counts.append(str(len(rows)))
    log.info("word basis: %s different words, %d directions", " and ".join(counts),
             min(len(basis.directions) for basis in bases))
    return bases
