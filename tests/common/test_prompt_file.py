"""Files of prompts: one format, whatever reads them."""
from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.prompts.prompt_sets import MINI_PROMPTS
from evaluation.prompts.prompt_sets import read_prompts as read_evaluation_prompts
from ldm.cli.generation import read_prompts
from ldm.common.errors import UserError
from ldm.common.prompt_file import FilePrompt, fill_slots, read_prompt_file
from ldm.data.templates import get_templates
from ldm.modules.covariance import read_captions
from ldm.training.concept_callbacks import BeforeDuringAfter

TEXT = "# mine\r\n[Style]\r\n a {} \u2028in the snow\n\n[ other ]\ra {}\x0bwith a hat\n[STYLE]\n\\#1 {}\n"


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_comments_headings_and_blank_lines_are_no_prompts(tmp_path: Path) -> None:
    assert read_prompt_file(written(tmp_path, "\ufeff" + TEXT)) == [
        FilePrompt("a {} \u2028in the snow", 3, "Style"), FilePrompt("a {}\x0bwith a hat", 6, "other"),
        FilePrompt("#1 {}", 8, "Style")]


def test_all_readers_agree(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    texts = [prompt.text for prompt in read_prompt_file(path)]
    assert read_prompts([], str(path)) == texts == [prompt.text for prompt in read_evaluation_prompts(path)]
    assert list(get_templates(str(path))) == texts == BeforeDuringAfter(str(path)).prompts
    bundled = [prompt.text for prompt in read_evaluation_prompts(MINI_PROMPTS)]
    assert read_prompts(["first"], str(MINI_PROMPTS)) == ["first", *bundled]


@pytest.mark.parametrize("separator", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
def test_lines_end_at_newlines_only(separator: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"a{separator}b\nc")
    assert read_prompts([], str(path)) == read_captions(path) == [f"a{separator}b", "c"]


@pytest.mark.parametrize(("content", "message"), [
    ("a dög".encode("utf-16"), "not a UTF-8 text file but one in UTF-16; save it as UTF-8"),
    ("a dög".encode("utf-32"), "not a UTF-8 text file but one in UTF-32"),
    ("a dog".encode("utf-16-le"), "has null characters"),
    ("a dog\na dög\n".encode("cp1252"), r"not a UTF-8 text file \(see line 2\)"),
    (b"# nothing\n[style]\n", "no prompts in it")])
def test_other_encodings_get_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    for read in (read_prompt_file, read_evaluation_prompts, get_templates):
        with pytest.raises(UserError, match=rf"prompts\.txt: .*{message}"):
            read(str(path))
    with pytest.raises(UserError, match="--from-file .*: no such file"):
        read_prompts([], str(tmp_path / "none.txt"))


def test_a_slot_is_the_only_concepts_word() -> None:
    assert fill_slots(["a {} and a {}", "a dog"], ["owl-x"]) == ["an owl-x and an owl-x", "a dog"]
    assert fill_slots("an {}", ["<my-owl>"]) == ["a <my-owl>"] and fill_slots(["a dog"], []) == ["a dog"]
    with pytest.raises(UserError, match="none is loaded"):
        fill_slots("a {}", [])
    with pytest.raises(UserError, match="2 are loaded; write <a> or <b>"):
        fill_slots("a {}", ["<a>", "<b>"])
