"""T5 as a text encoder, with a tiny tower, against transformers."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ldm.common.errors import UserError
from ldm.modules.encoders.modules import FrozenCLIPT5Encoder, FrozenT5Embedder

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "here": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("t5")
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_texts_are_padded_and_cut_off(folder: str) -> None:
    embedder = FrozenT5Embedder(folder, max_length=4)
    tokens = torch.tensor([[3, 4, 5, 0], [4, 4, 4, 4]])
    expected = T5EncoderModel.from_pretrained(folder)(input_ids=tokens).last_hidden_state
    assert torch.allclose(embedder.encode(["a cat here", "cat " * 9]), expected, atol=1e-6)
    assert embedder("a").shape == (1, 4, 8) and not any(p.requires_grad for p in embedder.parameters())


@torch.no_grad()
def test_clip_and_t5_encode_side_by_side(folder: str) -> None:
    both = FrozenCLIPT5Encoder("models/mini/text_encoder", folder, clip_max_length=16, t5_max_length=4)
    assert [encoding.shape[:2] for encoding in both.encode(["a cat"])] == [(1, 16), (1, 4)]


def test_missing_models_are_refused() -> None:
    with pytest.raises(UserError, match="text encoder /no/such/folder: no such folder; give a local folder"):
        FrozenT5Embedder("/no/such/folder")
