"""Merging renames concepts with equal placeholders and refuses concepts of different base models."""
from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.concept_values import assert_same_concept, make_concept, randn

from ldm.common.errors import UserError
from ldm.concepts.merging import rename_duplicates


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["<a>", "<b>"], ["<a>", "<b>"]),
        (["<a>", "<a>", "<a>"], ["<a>", "<a-2>", "<a-3>"]),
        (["<a>", "<a>", "<a-2>"], ["<a>", "<a-3>", "<a-2>"]),
        (["sks", "sks"], ["sks", "sks-2"]),
    ],
)
def test_equal_placeholders_are_numbered(words: list[str], expected: list[str]) -> None:
    concepts = [make_concept(word, seed=n) for n, word in enumerate(words)]
    merged = rename_duplicates(concepts)
    assert [concept.placeholder for concept in merged] == expected
    assert [concept.placeholder for concept in concepts] == words
    for old, new in zip(concepts, merged, strict=True):
        assert_same_concept(replace(new, placeholder=old.placeholder), old)


def test_new_placeholders_can_be_given() -> None:
    concepts = [make_concept("<a>"), make_concept("<a>", seed=1)]
    assert [c.placeholder for c in rename_duplicates(concepts, ["<x>", "<y>"])] == ["<x>", "<y>"]
    for words, message in (
        (["<x>"], "1 placeholders for 2 concepts"),
        (["<x>", "<x>"], "<x> is given twice"),
        (["<x>", "<X>"], "<X> is given twice .case is ignored"),
        (["<x>", "my bear"], "'my bear'"),
        (["<x>", ""], "''"),
    ):
        with pytest.raises(UserError, match=message):
            rename_duplicates(concepts, words)


def test_concepts_of_different_base_models_are_not_merged() -> None:
    one = make_concept("<a>", source="a.safetensors")
    other = make_concept("<b>", base="0" * 64, base_name="v1-5", source="b.safetensors")
    other.target_input = randn(768)
    with pytest.raises(UserError, match=r"b\.safetensors.*v1-5, Stable Diffusion 1.x.*a\.safetensors.*context 6"):
        rename_duplicates([one, other])
    rename_duplicates([one, make_concept("<b>", base="0" * 64)])  # of a fine-tune, for use together
