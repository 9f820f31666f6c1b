"""Lists of prompts: those of the project against the words of the mini world, and files as people write them."""
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
from ldm.data.mini.backgrounds import PLACES
from ldm.data.mini.scenes import PLAIN_TEMPLATES, RELATIONS, SIZES
from ldm.data.mini.styles import STYLES
from ldm.data.mini.world import COLOURS, KINDS, PATTERNS

CATEGORIES = ["recontextualisation", "property change", "style", "accessorisation"]


@pytest.mark.parametrize(("path", "least", "most"), [(MINI_PROMPTS, 16, 20), (PHOTO_PROMPTS, 20, 25)])
def test_the_projects_own_lists_ask_for_all_that_the_fields_sets_do(path: Path, least: int, most: int) -> None:
    prompts = read_prompts(path)
    assert list(dict.fromkeys(prompt.category for prompt in prompts)) == CATEGORIES
    assert least <= len(prompts) <= most and len({prompt.text for prompt in prompts}) == len(prompts)


def test_the_bundled_models_list_is_in_the_words_of_its_captions() -> None:
    wheres = [where for _, phrases in PLACES.values() for where in phrases]
    phrases = [*PLAIN_TEMPLATES, *STYLES, *wheres, *RELATIONS, *SIZES, *COLOURS, *PATTERNS,
               *(word for kind in KINDS for word in kind.words)]
    known = {"{}", "a", "an"} | {word for phrase in phrases for word in phrase.split()}
    for prompt in read_prompts(MINI_PROMPTS):
        assert set(prompt.text.split()) <= known
        assert prompt.text.endswith(tuple(wheres))


def test_the_word_goes_where_the_braces_are_and_its_article_with_it() -> None:
    prompt = EvaluationPrompt("style", "A {} and a dog")
    assert [prompt.fill(words) for words in ("<my-owl>", "owl", "teddy bear")] == [
        "A <my-owl> and a dog", "An owl and a dog", "A teddy bear and a dog"]
    assert EvaluationPrompt("", "a red {}").fill("owl") == "a red owl"


@pytest.mark.parametrize(("text", "placeholder", "expected"), [
    ("an <Owl> on a <owl>", "<owl>", "a mug on a mug"), ("a sks, not sksy", "sks", "a mug, not sksy"),
    ("banana * (a *)", "*", "banana mug (a mug)"), ("nothing", "<x>", "nothing")])
def test_placeholders_of_any_kind_are_put_into_words(text: str, placeholder: str, expected: str) -> None:
    assert replace_word("mug", placeholder, text) == expected


def test_files_have_headings_comments_and_plain_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# mine\na {} first\n\n[ my style ]\n  a {} second  \n", encoding="utf-8")
    assert read_prompts(path) == [EvaluationPrompt(UNCATEGORIZED, "a {} first"), EvaluationPrompt("my style", "a {} second")]


@pytest.mark.parametrize(("content", "said"), [
    (b"a {}\na dog\n", "line 2: 'a dog' needs exactly one {}"), (b"a {} and a {}\n", "needs exactly one"),
    (b"# none\n[style]\n", "no prompts in it"), (b"\xff\xfe\xfa", "not a text file in UTF-8"), (None, "no such file")])
def test_mistakes_are_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
