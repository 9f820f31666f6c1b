"""LDM's text encoder against diffusers' implementation, and its tokenizer against transformers'."""
from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from helpers.oracles import randomize
from helpers.oracles_bert import diffusers_bert_state
from torch import Tensor
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from ldm.common.errors import UserError
from ldm.modules.covariance import estimate_covariance
from ldm.modules.encoders.bert import BERT_TOKENIZER
from ldm.modules.encoders.modules import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.x_transformer import Encoder, TransformerWrapper

PROMPTS = ["a photo of a teddy bear", "", "It's a CAFÉ -- with 3 supercalifragilistic owls!"]
WORDS, LENGTH, WIDTH, DEPTH = 30522, 24, 16, 2
CLS, SEP, PAD = 101, 102, 0


@pytest.fixture(scope="module")
def encoder() -> BERTEmbedder:
    built = randomize(BERTEmbedder(WIDTH, DEPTH, max_seq_len=LENGTH), scale=0.2)
    built.freeze()
    return built


@pytest.fixture(scope="module")
def theirs(encoder: BERTEmbedder) -> LDMBertModel:
    model = LDMBertModel(LDMBertConfig(
        vocab_size=WORDS, max_position_embeddings=LENGTH, d_model=WIDTH, encoder_layers=DEPTH,
        encoder_ffn_dim=4 * WIDTH, encoder_attention_heads=8, head_dim=64, dropout=0.0)).eval()
    missing = model.load_state_dict(diffusers_bert_state(encoder.transformer.state_dict()), strict=False)
    assert missing.unexpected_keys == [] and [k for k in missing.missing_keys if "position_ids" not in k] == []
    return model


@pytest.fixture(scope="module")
def reference() -> BertTokenizerLegacy:
    """The tokenizer of BERT in plain Python."""
    return BertTokenizerLegacy(str(BERT_TOKENIZER / "vocab.txt"))


def reference_tokens(reference: BertTokenizerLegacy, prompts: list[str]) -> Tensor:
    rows = [[CLS, *reference.convert_tokens_to_ids(reference.tokenize(prompt)), SEP] for prompt in prompts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])


def test_the_vocabulary_is_that_of_bert_base_uncased() -> None:
    content = (BERT_TOKENIZER / "vocab.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    assert len(content.splitlines()) == WORDS


def test_tokens_equal_berts(encoder: BERTEmbedder, reference: BertTokenizerLegacy) -> None:
    expected = reference_tokens(reference, PROMPTS)
    assert torch.equal(encoder.tokenize(PROMPTS), expected)
    tokenizer = BERTTokenizer(max_length=LENGTH)
    assert torch.equal(tokenizer(PROMPTS), expected)
    assert torch.equal(tokenizer.encode(PROMPTS)[2][2], expected)
    assert torch.equal(BERTTokenizer(vq_interface=False, max_length=LENGTH).encode(PROMPTS[0]), expected[:1])


def test_equals_diffusers(encoder: BERTEmbedder, theirs: LDMBertModel, reference: BertTokenizerLegacy) -> None:
    with torch.no_grad():
        tokens = reference_tokens(reference, PROMPTS)
        expected = theirs.model(tokens)[0]
        got = encoder(PROMPTS)
        assert expected.std() > 0.1 and got.shape == (3, LENGTH, WIDTH)
        assert torch.allclose(got, expected, atol=1e-4)
        assert torch.allclose(encoder.encode(PROMPTS[0]), expected[:1], atol=1e-4)
        logits = theirs(tokens)[0]
        assert torch.allclose(encoder.transformer(tokens), theirs.to_logits(expected), atol=1e-3)
        assert torch.allclose(logits, expected, atol=1e-4)  # diffusers' pipeline passes these to the U-Net


def test_placeholders_extend_the_word_table(encoder: BERTEmbedder) -> None:
    tokens = encoder.tokenize(["a photo of <my-teddy>, here"], ["<my-teddy>"])
    assert (tokens == WORDS).sum() == 1
    vector = word_vector(encoder, "cat").clone().requires_grad_()
    encoded = encoder.encode_tokens(tokens, vector)
    assert torch.allclose(encoded, encoder(["a photo of cat, here"]), atol=1e-5)
    encoded.square().sum().backward()
    assert vector.grad.abs().max() > 0 and vector.grad.shape == (1, WIDTH)


def test_vectors_of_super_categories(encoder: BERTEmbedder) -> None:
    pieces = encoder.word_pieces("teddy birdbath")
    assert len(pieces) == 4
    assert torch.allclose(word_vector(encoder, "teddy birdbath"), encoder.token_table[pieces].mean(0, keepdim=True))
    with pytest.raises(UserError, match="'🧸' cannot be expressed"):  # BERT has no piece for it
        word_vector(encoder, "🧸")
    assert encoder.unknown_words("a 🧸 bear") == ["🧸"]


def test_untrained_words_are_unknown() -> None:
    encoder = BERTEmbedder(4, 1, max_seq_len=LENGTH)
    table = encoder.token_table
    table.data[:] = 0.5
    table.data[encoder.word_pieces("teddy bear")] = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert encoder.known_words() == ["bear", "teddy"] and encoder.unknown_words("A teddy's bear!") == ["A"]


def test_the_covariance_encodes_captions_with_their_padding(encoder: BERTEmbedder) -> None:
    captions = ["a cat", "a photo of a dog on a red bike", "two owls"]
    found = estimate_covariance(encoder, captions, progress=False)
    rows = torch.cat([encoder([caption])[0, 1:1 + len(encoder.word_pieces(caption))] for caption in captions]).double()
    assert found.tokens == len(rows) and torch.allclose(found.covariance, rows.mT @ rows / len(rows), atol=1e-4)


def test_prompts_that_are_too_long_are_cut_off(encoder: BERTEmbedder) -> None:
    long = " ".join(["owl"] * 99)
    with pytest.raises(UserError, match=f"has 99 tokens, but the text encoder takes {LENGTH - 2}"):
        encoder.tokenize([long])
    assert torch.equal(encoder.tokenize([long], truncate=True), BERTTokenizer(max_length=LENGTH)(long))
    assert torch.equal(encoder(long), encoder(" ".join(["owl"] * (LENGTH - 2))))


def test_tokens_of_another_vocabulary() -> None:
    embedder = randomize(TransformerEmbedder(8, 1, 50, max_seq_len=6))
    tokens = torch.tensor([[3, 49, 0], [1, 1, 1]])
    same = BERTEmbedder(8, 1, vocab_size=50, max_seq_len=6, use_tokenizer=False)
    same.load_state_dict(embedder.state_dict())
    assert embedder(tokens).shape == (2, 3, 8)
    assert torch.allclose(embedder.encode(tokens), same(tokens), atol=1e-6)
    with pytest.raises(UserError, match="vocab_size 50, but its tokenizer knows 30522"):
        BERTEmbedder(8, 1, vocab_size=50)


def test_embedding_dropout_acts_in_training_only() -> None:
    embedder = BERTEmbedder(8, 1, vocab_size=50, max_seq_len=6, use_tokenizer=False, embedding_dropout=0.5)
    tokens = torch.tensor([[3, 49, 0]])
    assert not torch.equal(embedder(tokens), embedder(tokens))
    embedder.eval()
    assert torch.equal(embedder(tokens), embedder(tokens))


def test_an_embedding_manager_sees_tokens_and_embeddings() -> None:
    embedder = BERTEmbedder(8, 1, vocab_size=50, max_seq_len=6, use_tokenizer=False).eval()
    tokens = torch.tensor([[3, 49, 0]])
    replaced = embedder.transformer.token_emb.weight[[7, 49, 0]][None]
    expected = embedder(torch.tensor([[7, 49, 0]]))

    def manager(seen: Tensor, embedded: Tensor) -> Tensor:
        assert torch.equal(seen, tokens) and embedded.shape == (1, 3, 8)
        return replaced

    assert torch.equal(embedder.encode(tokens, embedding_manager=manager), expected)
    assert torch.equal(embedder.transformer(tokens, True, embedding_manager=manager), expected)


def test_keys_are_those_of_x_transformers() -> None:
    keys = TransformerWrapper(5, 3, Encoder(4, 1)).state_dict()
    assert {key: tuple(value.shape) for key, value in keys.items()} == {
        "token_emb.weight": (5, 4), "pos_emb.emb.weight": (3, 4), "norm.weight": (4,), "norm.bias": (4,),
        "attn_layers.layers.0.0.weight": (4,), "attn_layers.layers.0.0.bias": (4,),
        "attn_layers.layers.0.1.to_q.weight": (512, 4), "attn_layers.layers.0.1.to_k.weight": (512, 4),
        "attn_layers.layers.0.1.to_v.weight": (512, 4), "attn_layers.layers.0.1.to_out.weight": (4, 512),
        "attn_layers.layers.0.1.to_out.bias": (4,), "attn_layers.layers.1.0.weight": (4,),
        "attn_layers.layers.1.0.bias": (4,), "attn_layers.layers.1.1.net.0.0.weight": (16, 4),
        "attn_layers.layers.1.1.net.0.0.bias": (16,), "attn_layers.layers.1.1.net.2.weight": (4, 16),
        "attn_layers.layers.1.1.net.2.bias": (4,), "to_logits.weight": (5, 4), "to_logits.bias": (5,)}
