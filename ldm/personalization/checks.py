"""Checks on the params of methods, and on a run before it loads anything."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldm.common.errors import UserError
from ldm.concepts.prompt_checks import check_super_category
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.templates import fill_template
from ldm.modules.encoders.prompts import PromptEncoder


def check_positive(**values: float) -> None:
    """Raise UserError that names the first param that is not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{name} {value} must be above 0")


def check_known(**values: tuple[str, Collection[str]]) -> None:
    """Raise UserError that names the first param whose value is not one of those that are known.

    Args:
        values: name -> (value, known values).
    """
    for name, (value, known) in values.items():
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def check_datasets(datasets: Mapping[str, Any]) -> None:
    """Raise UserError if a run has images to validate or test with."""
    for name in ("validation", "test"):
        if name in datasets:
            raise UserError(f"data.params.{name}: a loss on other images says nothing about the concept; leave it "
                            "out, and measure concepts with evaluation/clip_eval.py")


def check_words(encoder: PromptEncoder, photos: Sequence[ConceptPhotos], super_categories: Sequence[str]) -> None:
    """Raise UserError if a super-category cannot be expressed, or a prompt with it is too long."""
    for dataset, category in zip(photos, super_categories, strict=True):
        check_super_category(encoder, category)
        encoder.tokenize([fill_template(template, category) for template in dataset.prompts])
