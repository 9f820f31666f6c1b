"""Prompt lists: the bundled ones, and files as users write them."""
from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.prompts.prompt_sets import (
    MINI_PROMPTS,
    PHOTO_PROMPTS,
    UNCATEGORIZED,
    EvaluationPrompt,
    read_prompts,
    replace_word,
)
from ldm.common.errors import UserError
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import PLAIN_TEMPLATES, RELATIONS, SIZES
from ldm.data.mini.styles import STYLES
from ldm.data.mini.world import COLORS, KINDS, PATTERNS

CATEGORIES = ["recontextualization", "property change", "style", "accessorization"]


@pytest.mark.parametrize(("path", "least", "most"), [(MINI_PROMPTS, 16, 20), (PHOTO_PROMPTS, 20, 25)])
def test_the_bundled_lists_cover_all_categories(path: Path, least: int, most: int) -> None:
    prompts = read_prompts(path)
    assert list(dict.fromkeys(prompt.category for prompt in prompts)) == CATEGORIES
    assert least <= len(prompts) <= most and len({prompt.text for prompt in prompts}) == len(prompts)


def test_the_list_of_the_bundled_model_uses_only_words_of_its_captions() -> None:
    locations = [location for _, phrases in BACKGROUNDS.values() for location in phrases]
    phrases = [*PLAIN_TEMPLATES, *STYLES, *locations, *RELATIONS, *SIZES, *COLORS, *PATTERNS,
               *(word for kind in KINDS for word in kind.words)]
    known = {"{}", "a", "an"} | {word for phrase in phrases for word in phrase.split()}
    for prompt in read_prompts(MINI_PROMPTS):
        assert set(prompt.text.split()) <= known
        assert prompt.text.endswith(tuple(locations))


def test_the_word_replaces_the_braces_and_the_article_fits_it() -> None:
    prompt = EvaluationPrompt("style", "A {} and a dog")
    assert [prompt.fill(words) for words in ("<my-owl>", "owl", "teddy bear")] == [
        "A <my-owl> and a dog", "An owl and a dog", "A teddy bear and a dog"]
    assert EvaluationPrompt("", "a red {}").fill("owl") == "a red owl"


@pytest.mark.parametrize(("text", "placeholder", "expected"), [
    ("an <Owl> on a <owl>", "<owl>", "a mug on a mug"), ("a sks, not sksy", "sks", "a mug, not sksy"),
    ("banana * (a *)", "*", "banana mug (a mug)"), ("nothing", "<x>", "nothing")])
def test_placeholders_of_any_form_are_replaced(text: str, placeholder: str, expected: str) -> None:
    assert replace_word("mug", placeholder, text) == expected


def test_files_may_have_headings_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# mine\na {} first\n\n[ my style ]\n  a {} second  \n", encoding="utf-8")
    assert read_prompts(path) == [EvaluationPrompt(UNCATEGORIZED, "a {} first"),
                                  EvaluationPrompt("my style", "a {} second")]


@pytest.mark.parametrize(("content", "message"), [
    (b"a {}\na dog\n", "line 2: 'a dog' must have exactly one {}"), (b"a {} and a {}\n", "must have exactly one"),
    (b"# none\n[style]\n", "no prompts in it"), (b"\xff\xfe\xfa", "not a UTF-8 text file"), (None, "no such file")])
def test_errors_name_the_file_and_the_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
