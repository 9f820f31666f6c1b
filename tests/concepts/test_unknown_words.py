"""Words that a text encoder does not know, because its training never contained them."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models

from ldm.common.errors import UserError
from ldm.concepts.prompt_checks import check_super_category, warn_unknown_words
from ldm.modules.encoders.modules import FrozenCLIPEmbedder


@pytest.fixture
def encoder(tmp_path: Path) -> FrozenCLIPEmbedder:
    """A text encoder that knows "teddy", "bear" and "a" only."""
    embedder = FrozenCLIPEmbedder(tiny_models.write_text_tower(tmp_path / "tower"), max_length=16)
    embedder.token_table.data[:] = 1.0
    for number, word in enumerate(("teddy", "bear", "a")):
        embedder.token_table.data[embedder.word_pieces(word)] = float(number + 2)
    return embedder


@pytest.mark.slow
def test_unknown_words_are_refused_or_warned_of(encoder: FrozenCLIPEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    assert encoder.unknown_words('A "Teddy", a cat - and a (cat)?') == ["cat", "and"]
    assert encoder.known_words() == ["a", "bear", "teddy"]
    with pytest.raises(UserError, match="does not know the word tedy; give another, it knows teddy$"):
        check_super_category(encoder, "tedy")
    with pytest.raises(UserError, match="big, cat; give another, it knows a, bear, teddy$"):
        check_super_category(encoder, "big cat")
    check_super_category(encoder, "teddy bear")
    warn_unknown_words(encoder, ["a <cat> bear"], ["<cat>"])
    assert not caplog.records
    check_super_category(encoder, "big bear")
    warn_unknown_words(encoder, ["a <cat> bear <my-cat>"], ["<cat>"])
    assert ["does not know big" in caplog.messages[0], "does not know my-cat" in caplog.messages[1]] == [True, True]


def test_a_table_without_a_common_row_knows_all_words(encoder: FrozenCLIPEmbedder) -> None:
    encoder.token_table.data.normal_(generator=torch.Generator().manual_seed(0))
    assert encoder.unknown_words("qzxvk 🧸") == [] == encoder.known_words()
