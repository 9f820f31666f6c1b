"""The subjects of an evaluation: example concepts, and pairs of them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.paper.design import Study


@dataclass(frozen=True)
class ExampleConcept:
    """A subject to learn.

    Attributes:
        name: its name in files and tables.
        folder: its photos.
        super_category: what kind of subject it is.
    """

    name: str
    folder: Path
    super_category: str

    @property
    def concepts(self) -> tuple[ExampleConcept, ...]:
        """The concepts in an image of it."""
        return (self,)

    @property
    def placeholder(self) -> str:
        """Its word in prompts."""
        return f"<my-{self.name}>"


@dataclass(frozen=True)
class ConceptPair:
    """Two concepts in one image; prompts name `first` first."""

    first: ExampleConcept
    second: ExampleConcept

    @property
    def concepts(self) -> tuple[ExampleConcept, ...]:
        """The concepts in an image of the pair."""
        return self.first, self.second

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"{self.first.name}+{self.second.name}"


EvalTarget = ExampleConcept | ConceptPair


def concept_names(target: EvalTarget) -> tuple[str, ...]:
    """Return the names of the concepts in an image of a target."""
    return tuple(concept.name for concept in target.concepts)


def study_targets(study: Study, examples: Sequence[ExampleConcept]) -> list[EvalTarget]:
    """Return what a study generates images of: each example, or each example with the next one, or nothing.

    In pairs, each example is named first once and second once.
    """
    if study.kind == "trade-off":
        return list(examples)
    following = [*examples[1:], examples[0]]
    if study.kind == "pairs":
        return [ConceptPair(first, second) for first, second in zip(examples, following, strict=True)]
    return []
