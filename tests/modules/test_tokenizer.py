"""The bundled tokenizer against open_clip's independent implementation.

open_clip first repairs texts by ftfy (curly quotes, ligatures, HTML entities). In these tests both read repaired texts.
"""

from __future__ import annotations

import json
from pathlib import Path

import ftfy
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from ldm.modules.encoders.modules import TOKENIZER
from ldm.modules.encoders.tokenizer import write_clip_tokenizer

START, END = 49406, 49407
STRINGS = (
    "",
    "a photo of a teddy bear",
    "A PHOTO of a <my-teddy>!",
    "it's the dog's, they'll say we've won; I'm sure",
    "1999 balloons, 3.5 metres & 50% more",
    "café naïve Ångström",
    "日本語の写真",
    "🧸 on the beach 🏖️",
    "a\tb\n c   d",
    "hyphen-ated under_scored slash/ed",
    "((masterpiece:1.2)), [ugly], *, @user #tag",
    "…“quoted”—dash",
    "ﬁne ligature",
    "supercalifragilisticexpialidocious",
    "x" * 100,
    "Ελλάδα привет",
)


@pytest.fixture(scope="module")
def ours() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def theirs(text: str, length: int = 77) -> list[int]:
    row = open_clip.tokenize([text], context_length=length)[0].tolist()
    return row[: row.index(END) + 1] if END in row else row


@pytest.mark.parametrize("text", STRINGS)
def test_equals_open_clip(ours: CLIPTokenizer, text: str) -> None:
    assert ours(ftfy.fix_text(text), truncation=True, max_length=77)["input_ids"] == theirs(text)


WORDS = st.text(
    st.characters(
        min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cc", "Cf", "Zs"], exclude_characters="&<>"
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=8).map(" ".join))
def test_equals_open_clip_on_random_latin_words(ours: CLIPTokenizer, text: str) -> None:
    assert ours(ftfy.fix_text(text), truncation=True, max_length=77)["input_ids"] == theirs(text)


def test_padding_and_length(ours: CLIPTokenizer) -> None:
    row = ours("a cat", padding="max_length", max_length=77)["input_ids"]
    assert len(row) == 77 and row[0] == START and set(row[3:]) == {END}
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, len(ours)) == (START, END, END, 49408)


def test_the_bundled_files_are_those_that_the_function_writes(tmp_path: Path) -> None:
    assert write_clip_tokenizer(tmp_path / "new") == tmp_path / "new"
    written = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert written == {path.name: path.read_bytes() for path in TOKENIZER.iterdir()}
    vocabulary = json.loads(written["vocab.json"])
    assert sorted(vocabulary.values()) == list(range(49408))
    assert len(written["merges.txt"].splitlines()) == 1 + len(SimpleTokenizer().bpe_ranks)
