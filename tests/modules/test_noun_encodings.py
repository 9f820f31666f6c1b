"""Encodings of nouns, by hand."""
from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import TEMPLATES, build_model

from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.noun_encodings import mean_encoding, told_moves


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return build_model(tmp_path_factory.mktemp("model")).cond_stage_model


def test_the_mean_encoding_is_over_templates(encoder: PromptEncoder) -> None:
    vector, encoding = mean_encoding(encoder, "cat", TEMPLATES)
    rows = [encoder([template.replace("{}", "cat")])[0] for template in TEMPLATES]
    positions = [1 + template.split().index("{}") for template in TEMPLATES]
    expected = torch.stack([row[position] for row, position in zip(rows, positions, strict=True)]).mean(0)
    torch.testing.assert_close(encoding, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vector, encoder.token_table[encoder.word_pieces("cat")])


def test_words_move_the_encoding_of_the_noun(encoder: PromptEncoder) -> None:
    moves = told_moves(encoder, ["cat", "teddy bear", "cat"], ["red", "orange", ""])
    plain, red = encoder(["a photo of a cat", "a photo of a red cat"])
    torch.testing.assert_close(moves[0], red[6] - plain[5], rtol=1e-4, atol=1e-5)
    bears, orange = encoder(["a photo of a teddy bear", "a photo of an orange teddy bear"])  # "an"
    torch.testing.assert_close(moves[1], orange[6:8].mean(0) - bears[5:7].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(moves[2], torch.zeros_like(moves[2]))
