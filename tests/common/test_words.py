"""Words compared after NFC and case folding, and prompts in plain words."""
from __future__ import annotations

import unicodedata

import pytest

from ldm.common.errors import UserError
from ldm.common.words import fold_word, replace_words, spell_out, split_at_placeholders, super_category_words
from ldm.concepts.placeholders import find_duplicate

DECOMPOSED = unicodedata.normalize("NFD", "<bär>")


@pytest.mark.parametrize(("one", "other"), [
    ("<BÄR>", DECOMPOSED), ("Straße", "STRASSE"), ("ﬃ", "FFI"), ("<Ǆ>", "<ǆ>"), ("Ω", "ω")])
def test_words_are_equal_whatever_their_case_and_composition(one: str, other: str) -> None:
    assert fold_word(one) == fold_word(other) and find_duplicate([one, other]) == other


def test_placeholders_are_found_in_any_spelling_and_the_rest_stays_in_place() -> None:
    assert split_at_placeholders(f"ein {DECOMPOSED} und <BÄR>s", ["<bär>"]) == ["ein ", 0, " und ", 0, "s"]
    assert split_at_placeholders("die Straße <STRASSE> groß", ["<straße>", "GROSS"]) == ["die Straße ", 0, 1]
    assert replace_words({"<STRASSE>": "owl", "x": None}, "a <straße> x") == "an owl x"


@pytest.mark.parametrize(("prompt", "words", "expected"), [
    ("photo of a <new1> cat at a beach", "cat", "photo of a cat at a beach"),
    ("a cat <new1> at a beach", "cat", "a cat at a beach"),
    ("a <new1> teddy bear in the snow", "teddy bear", "a teddy bear in the snow"),
    ("A <NEW1> Teddy-Bear", "teddy bear", "A teddy bear"),
    ("a teddy <new1> bear", "teddy bear", "a teddy bear"),
    ("a <new1> bear on a chair", "teddy bear", "a teddy bear on a chair"),
    ("two <new1> cats", "cat", "two cats"),
    ("a <new1> catamaran", "cat", "a cat catamaran"),
    ("a <new1>, a cat", "cat", "a cat, a cat"),
    ("a <new1> owl", "owl", "an owl"),
    ("a <new1> and a <new1> cat", "cat", "a cat and a cat"),
    ("nothing", "cat", "nothing"),
])
def test_a_super_category_beside_its_placeholder_is_written_once(prompt: str, words: str, expected: str) -> None:
    assert spell_out({"<new1>": words}, prompt) == expected


def test_other_placeholders_stay() -> None:
    assert spell_out({"<a>": "cat", "<b>": None}, "a <a> cat on a <b> cat") == "a cat on a <b> cat"


@pytest.mark.parametrize("given", ["teddy_bear", "'teddy bear'", '"teddy  bear"', "“teddy_bear”", " teddy bear "])
def test_super_categories_are_normalised(given: str) -> None:
    assert super_category_words(given) == "teddy bear"


@pytest.mark.parametrize("given", ["teddy|bear", "teddy,bear", "teddy/bear", "teddy;bear", "teddy + bear"])
def test_separators_in_a_super_category_are_refused(given: str) -> None:
    with pytest.raises(UserError, match='separates no words here; give plain words .* "teddy bear"'):
        super_category_words(given)
